"""Scores: how sure the network is of a slot, by which masked slots are ranked.

A score is a function of one position's logits and its drawn token, higher
means sooner. Computed on chunks of positions, inside `reduce`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.core.noise import Tag
from dllm_jax.core.types import Noise

Score = Literal["confidence", "margin", "entropy", "random", "left"]
SCORES = ("confidence", "margin", "entropy", "random", "left")


def log_prob(
  logits: Float[Array, "B c V"], token: Int[Array, "B c"]
) -> Float[Array, "B c"]:
  """Returns log softmax(logits) of a token, nats; 0 where it is not possible."""
  picked = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
  found = picked - jax.nn.logsumexp(logits, axis=-1)
  return jnp.where(picked > -jnp.inf, found, 0.0)


def confidence(
  logits: Float[Array, "B c V"], token: Int[Array, "B c"]
) -> Float[Array, "B c"]:
  """Returns the probability of a token; 0 where no token is possible."""
  picked = jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]
  p = jnp.exp(picked - jax.nn.logsumexp(logits, axis=-1))
  return jnp.where(picked > -jnp.inf, p, 0.0)


def margin(logits: Float[Array, "B c V"]) -> Float[Array, "B c"]:
  """Returns the probability of the best token less that of the second."""
  ids = jnp.arange(logits.shape[-1])
  first = jnp.argmax(logits, axis=-1)
  rest = jnp.where(ids == first[..., None], -jnp.inf, logits)
  second = jnp.argmax(rest, axis=-1)
  return confidence(logits, first) - confidence(logits, second)


def entropy(logits: Float[Array, "B c V"]) -> Float[Array, "B c"]:
  """Returns the entropy of softmax(logits), nats."""
  log_p = jax.nn.log_softmax(logits)
  p = jnp.exp(log_p)
  return -jnp.sum(p * jnp.where(p > 0, log_p, 0.0), axis=-1)


def score(
  name: Score,
  logits: Float[Array, "B c V"],
  sure: Float[Array, "B c"],
  noise: Noise,
  slot: Int[Array, "B c"],
) -> Float[Array, "B c"]:
  """Returns the named score.

  "confidence" of the drawn token (LLaDA, maskgit-plus), "margin" of the two
  best, "entropy" (its negative; Dream), "random", or "left": from the left.
  """
  if name == "confidence":
    return sure
  if name == "margin":
    return margin(logits)
  if name == "entropy":
    return -entropy(logits)
  if name == "random":
    return noise.uniform(Tag.CONFIDENCE, 1)[..., 0]
  return -slot.astype(jnp.float32)

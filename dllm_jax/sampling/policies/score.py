"""Scores: how sure the network is of a slot, by which masked slots are ranked.

A score is a function of one position's logits and its drawn token, higher
means sooner. Computed on chunks of positions, inside `reduce`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.core.noise import masses, Tag
from dllm_jax.core.types import Noise
from dllm_jax.core.vocabulary import best

Score = Literal["confidence", "margin", "entropy", "random", "left"]
SCORES = ("confidence", "margin", "entropy", "random", "left")


def at(
  logits: Float[Array, "B c V"], token: Int[Array, "B c"]
) -> Float[Array, "B c"]:
  """Returns the logits of a token."""
  return jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0]


def log_prob(
  logits: Float[Array, "B c V"],
  token: Int[Array, "B c"],
  log_sum: Float[Array, "B c"] | float | None = None,
) -> Float[Array, "B c"]:
  """Returns log softmax(logits) of a token, nats; 0 where it is not possible.

  Args:
    logits: of a position's tokens.
    token: one of them.
    log_sum: logsumexp of the logits, where that is known.
  """
  picked = at(logits, token)
  if log_sum is None:
    log_sum = jax.nn.logsumexp(logits, axis=-1)
  return jnp.where(picked > -jnp.inf, picked - log_sum, 0.0)


def log_sum(
  logits: Float[Array, "B c V"], largest: Float[Array, "B c"] | None = None
) -> Float[Array, "B c"]:
  """Returns logsumexp of logits, by as few passes over the vocabulary as it takes.

  Args:
    logits: those of a draw.
    largest: the largest of them, where it is known: else it and the sum are those
      that a draw from them forms as well (`noise.masses`).
  """
  if largest is None:
    largest, mass = masses(logits)
    total = jnp.sum(mass, axis=-1)
  else:
    largest = jnp.where(largest > -jnp.inf, largest, 0.0)
    total = jnp.exp(logits - largest[..., None])
  return largest + jnp.log(jnp.sum(total, axis=-1))


def confidence(
  logits: Float[Array, "B c V"],
  token: Int[Array, "B c"],
  log_sum: Float[Array, "B c"] | float | None = None,
) -> Float[Array, "B c"]:
  """Returns the probability of a token; 0 where it is not possible.

  Args:
    logits: as of `log_prob`, and so are the others.
    token: one of them.
    log_sum: logsumexp of the logits, where that is known.
  """
  picked = at(logits, token)
  found = jnp.exp(log_prob(logits, token, log_sum))
  return jnp.where(picked > -jnp.inf, found, 0.0)


def margin(logits: Float[Array, "B c V"]) -> Float[Array, "B c"]:
  """Returns the probability of the best token less that of the second."""
  ids = jnp.arange(logits.shape[-1])
  first = best(logits)
  rest = jnp.where(ids == first[..., None], -jnp.inf, logits)
  second = best(rest)
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

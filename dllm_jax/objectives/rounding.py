"""From vectors to tokens and back: what Diffusion-LM rounds by.

Parameters are `embedding` [V, E] and the `bias` [V] of a head tied to it. The
vocabulary is met on chunks of positions, as everywhere.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.core import vocabulary
from dllm_jax.core.types import ModelOutputs
from dllm_jax.core.vocabulary import reduce

Params = Mapping[str, Array]


def head(params: Params, x: Float[Array, "B L E"]) -> ModelOutputs:
  """Returns log p(w | x) of the linear head, as a network's outputs."""
  return ModelOutputs(
    hidden=x, unembed=params["embedding"].T, bias=params["bias"], tied=True
  )


def best(out: ModelOutputs) -> Int[Array, "B L"]:
  """Returns the token with the greatest logit."""
  return reduce(vocabulary.best, out)


def nearest(params: Params, x: Float[Array, "B L E"]) -> Int[Array, "B L"]:
  """Returns the token whose embedding is nearest."""
  table = params["embedding"]
  square = jnp.sum(jnp.square(table), axis=-1)
  return best(
    ModelOutputs(hidden=x, unembed=table.T, bias=-0.5 * square, tied=True)
  )


def log_by_distance(
  params: Params, x: Float[Array, "B c E"]
) -> Float[Array, "B c V"]:
  """Returns log softmax(-|x - emb(w)|)."""
  table = params["embedding"]
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  square += jnp.sum(jnp.square(table), axis=-1) - 2.0 * x @ table.T
  return jax.nn.log_softmax(-jnp.sqrt(jnp.maximum(square, 0.0)))

"""Scores of queries and keys, and what they mix: the parts of one softmax.

Softmax is float32, grouped keys and values are never repeated: the R query heads
of a group are stacked as rows of one matrix product. Whoever cuts keys into parts
(`attention`, `context`) joins maxima and sums of rows itself.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dllm_jax.core.axes import folded, once, summed_product

# Finite, so that a row without any allowed key gives numbers and not NaN.
MASKED = -1e30


def row_max(scores: Float[Array, "*n S"]) -> Float[Array, "*n 1"]:
  """Returns the largest score of each row, without a gradient.

  Any shift leaves a softmax alone, so none goes through it.
  """
  return folded(jnp.maximum, jax.lax.stop_gradient(scores))[..., None]


def row_sum(p: Float[Array, "*n S"]) -> Float[Array, "*n 1"]:
  """Returns the sum of each row."""
  return jnp.sum(p, axis=-1, keepdims=True)


def scores(q, k, allowed) -> Float[Array, "B G R T S"]:
  """Returns scaled float32 scores, `MASKED` where not allowed.

  Args:
    q: queries `[B, T, H, K]`.
    k: keys `[B, S, G, K]`.
    allowed: booleans that broadcast to the result.
  """
  batch, length, heads, width = q.shape
  groups = k.shape[2]
  q = (q * width**-0.5).reshape(batch, length, groups, -1, width)
  q = jnp.transpose(q, (0, 2, 3, 1, 4)).reshape(batch, groups, -1, width)
  products = summed_product("bgnk,bgsk->bgns", q, jnp.swapaxes(k, 1, 2))
  products = products.reshape(batch, groups, heads // groups, length, -1)
  return jnp.where(once(allowed), products, MASKED)


def mix(p, v) -> Float[Array, "B G R T K"]:
  """Returns float32 sums of values `[B, S, G, K]` weighted by p's rows."""
  batch, groups, repeat, length, _ = p.shape
  p = p.astype(v.dtype).reshape(batch, groups, repeat * length, -1)
  mixed = summed_product("bgns,bgsk->bgnk", p, jnp.swapaxes(v, 1, 2))
  return mixed.reshape(batch, groups, repeat, length, -1)


def to_heads(x: Float[Array, "B G R T K"]) -> Float[Array, "B T H K"]:
  """Returns mixed values with heads after positions, as they came."""
  batch, groups, repeat, length, width = x.shape
  x = jnp.transpose(x, (0, 3, 1, 2, 4))
  return x.reshape(batch, length, groups * repeat, width)


def from_heads(x, groups: int) -> Float[Array, "B G R T K"]:
  """Returns `to_heads`'s argument."""
  batch, length, heads, width = x.shape
  x = x.reshape(batch, length, groups, heads // groups, width)
  return jnp.transpose(x, (0, 2, 3, 1, 4))

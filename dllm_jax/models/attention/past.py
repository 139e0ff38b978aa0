"""Attention to what a call brings and to what was read before, in two parts.

Kept keys and values stay where they are: the two parts have scores of their own,
whose maxima and sums one softmax joins. Masks are arrays, as rows stand at slots
of their own.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dllm_jax.core.axes import axis_size, BATCH_AXES, TENSOR
from dllm_jax.models.attention.scores import (
  mix,
  row_max,
  row_sum,
  scores,
  to_heads,
)

# Scores that a device holds at once, about (256 MiB in float32).
_SCORES = 2**26


def attention(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T G K"],
  v: Float[Array, "B T G K"],
  past: tuple[Float[Array, "B G S K"], Float[Array, "B G S K"]],
  own: Bool[Array, "B T T"],
  seen: Bool[Array, "B T S"],
) -> Float[Array, "B T H K"]:
  """Returns softmax(q [past, k]^T / sqrt(K)) [past, v].

  Args:
    q: rotated queries.
    k: rotated keys of the same positions.
    v: their values.
    past: keys and values that were kept.
    own: which of the positions a query sees.
    seen: which of the kept ones.
  """
  past_k, past_v = (jnp.swapaxes(x, 1, 2).astype(k.dtype) for x in past)

  def piece(q, own, seen):
    near = scores(q, k, own[:, None, None])
    far = scores(q, past_k, seen[:, None, None])
    top = jnp.maximum(row_max(near), row_max(far))
    near, far = jnp.exp(near - top), jnp.exp(far - top)
    mixed = mix(near, v) + mix(far, past_v)
    return to_heads((mixed / (row_sum(near) + row_sum(far))).astype(q.dtype))

  batch, length, heads, _ = q.shape
  rows = -(-batch // axis_size(*BATCH_AXES)) * -(-heads // axis_size(TENSOR))
  most = max(_SCORES // (rows * (length + seen.shape[2])), 1)
  size = next(n for n in range(length, 0, -1) if length % n == 0 and n <= most)
  if size == length:
    return piece(q, own, seen)
  cut = lambda x: jnp.moveaxis(
    x.reshape(batch, length // size, size, *x.shape[2:]), 1, 0
  )
  step = jax.checkpoint(lambda x: piece(*x))
  pieces = jax.lax.map(step, tuple(map(cut, (q, own, seen))))
  return jnp.moveaxis(pieces, 0, 1).reshape(q.shape)

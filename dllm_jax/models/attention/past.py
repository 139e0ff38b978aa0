"""Attention to what a call brings and to what was read before.

What was kept stays where it is: it and the call's own keys have scores of their
own, whose maxima and sums one softmax joins. Masks are arrays, as rows stand at
slots of their own. On GPUs a kernel (`kept`) does the same without scores in
memory, if asked for, where a query sees all that has its segment.
"""

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.core.axes import axis_size, BATCH_AXES, TENSOR
from dllm_jax.core.mask import Full
from dllm_jax.core.types import KVCache
from dllm_jax.models.attention import kept
from dllm_jax.models.attention.scores import (
  mix,
  row_max,
  row_sum,
  scores,
  to_heads,
)

# Scores that a device holds at once, about (256 MiB in float32).
_SCORES = 2**26


@struct.dataclass
class Past:
  """Keys and values that were kept, of a stack of layers.

  Attributes:
    key: of all layers.
    value: of all layers.
    layer: which of them is asked.
  """

  key: Float[Array, "N B G S K"]
  value: Float[Array, "N B G S K"]
  layer: Int[Array, ""]


@struct.dataclass
class Sight:
  """What the queries of a call see.

  Attributes:
    own: which of the call's positions, and
    seen: which of the kept ones.
    segments: of the call's positions and of the kept ones, 0 for hidden ones,
      where a query sees all that has its own; None where masks say more.
  """

  own: Bool[Array, "B T T"]
  seen: Bool[Array, "B T S"]
  segments: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None


def attention(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B T G K"],
  v: Float[Array, "B T G K"],
  past: Past,
  sight: Sight,
  implementation: str | None = None,
) -> Float[Array, "B T H K"]:
  """Returns softmax(q [past, k]^T / sqrt(K)) [past, v].

  Args:
    q: rotated queries.
    k: rotated keys of the same positions.
    v: their values.
    past: keys and values that were kept.
    sight: what queries see.
    implementation: "cudnn" or "flash" for the kernel on GPUs, which has no
      gradient.
  """
  if sight.segments is not None and kept.chosen(implementation):
    mine, held = sight.segments
    cache = KVCache(key=past.key, value=past.value, segment_ids=held)
    if kept.fits(cache, Full()):
      return kept.attention(
        q,
        cache,
        past.layer,
        mask=Full(),
        q_segments=mine,
        k_segments=held,
        q_slots=jnp.zeros_like(mine),
        own=(k, v),
      )

  def of_layer(stack):
    one = jax.lax.dynamic_index_in_dim(stack, past.layer, 0, keepdims=False)
    return jnp.swapaxes(one, 1, 2).astype(k.dtype)

  past_k, past_v = of_layer(past.key), of_layer(past.value)

  def piece(q, own, seen):
    near = scores(q, k, own[:, None, None])
    far = scores(q, past_k, seen[:, None, None])
    top = jnp.maximum(row_max(near), row_max(far))
    near, far = jnp.exp(near - top), jnp.exp(far - top)
    mixed = mix(near, v) + mix(far, past_v)
    return to_heads((mixed / (row_sum(near) + row_sum(far))).astype(q.dtype))

  arrays = q, sight.own, sight.seen
  batch, length, heads, _ = q.shape
  rows = -(-batch // axis_size(*BATCH_AXES)) * -(-heads // axis_size(TENSOR))
  most = max(_SCORES // (rows * (length + sight.seen.shape[2])), 1)
  size = next(n for n in range(length, 0, -1) if length % n == 0 and n <= most)
  if size == length:
    return piece(*arrays)
  cut = lambda x: jnp.moveaxis(
    x.reshape(batch, length // size, size, *x.shape[2:]), 1, 0
  )
  step = jax.checkpoint(lambda x: piece(*x))
  pieces = jax.lax.map(step, tuple(map(cut, arrays)))
  return jnp.moveaxis(pieces, 0, 1).reshape(q.shape)

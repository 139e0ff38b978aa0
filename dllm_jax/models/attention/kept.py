r"""Attention on GPUs to keys and values where they are kept: none is copied.

FlashAttention-2 (arXiv:2307.08691) in a Pallas kernel that is given the cache of
all layers and a layer's number. A program reads one head's keys and values of one
row once, for some queries; no scores are in memory. Slots behind a row's last
segment are not read.

XLA's products want arrays of their own: out of a cache of all layers they copy a
layer's keys and values first, and write and read the scores for each step of their
softmax.
"""

import functools
import math

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.core.axes import axis_size, BATCH_AXES, CONTEXT, TENSOR
from dllm_jax.core.mask import MaskSpec, TwoStream
from dllm_jax.core.types import KVCache
from dllm_jax.models.attention.scores import MASKED

_ROWS, _TILE = 64, 64  # queries and keys of a tile, at most
_LEAST_TILE = 16  # what a product of tiles has at least
# Above `MASKED`, below every score: exp2(MASKED - _LEAST) is 0, not 1.
_LEAST = -1e20

NAME = "flash_kept"
"""By which a plan knows the kernel."""


def fits(cache: KVCache, spec: MaskSpec) -> bool:
  """Returns whether the kernel can read a cache.

  It wants a mask by slots, heads as wide as a power of 2, a multiple of 16 slots,
  and positions that no devices divide.
  """
  slots, width = cache.segment_ids.shape[1], cache.key.shape[4]
  return (
    not isinstance(spec, TwoStream)
    and width >= _LEAST_TILE
    and not width & (width - 1)
    and slots % _LEAST_TILE == 0
    and axis_size(CONTEXT) == 1
  )


def attention(
  q: Float[Array, "B T H K"],
  cache: KVCache,
  layer: Int[Array, ""],
  *,
  mask: MaskSpec,
  q_segments: Int[Array, "B T"],
  k_segments: Int[Array, "B S"],
  q_slots: Int[Array, "B T"],
  interpret: bool = False,
) -> Float[Array, "B T H K"]:
  """Returns softmax(q k^T / sqrt(K)) v over the kept keys of a layer.

  Args:
    q: rotated queries.
    cache: of all layers, the queries' own keys and values written.
    layer: the layer's number.
    mask: who attends to whom, by slot.
    q_segments: the segment of each query; a query sees its own segment only.
    k_segments: the segment of each slot; 0 hides it from every real query.
    q_slots: the slot of each query.
    interpret: whether the kernel runs step by step, off a GPU.

  Returns:
    The mixed values, in the type of q; zeros for a query whose keys are all
    forbidden.
  """
  run = functools.partial(_here, mask, interpret)
  arrays = (q, cache.key, cache.value, layer[None])
  arrays += (q_segments, k_segments, jnp.broadcast_to(q_slots, q.shape[:2]))
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return run(*arrays)
  rows = tuple(a for a in BATCH_AXES if a in mesh.shape)
  # Fewer rows than the cache has are no equal shares of its rows.
  even = q.shape[0] == cache.key.shape[1] and q.shape[0] % axis_size(*rows) == 0
  rows = rows if even else None
  tensor = TENSOR if TENSOR in mesh.shape else None
  tensor = tensor if cache.key.shape[2] % axis_size(TENSOR) == 0 else None
  kept, by_row = jax.P(None, rows, tensor), jax.P(rows)
  return jax.shard_map(
    run,
    in_specs=(
      jax.P(rows, None, tensor), kept, kept, jax.P(), by_row, by_row, by_row,
    ),
    out_specs=jax.P(rows, None, tensor),
    check_vma=False,
  )(*arrays)  # fmt: skip


def _here(
  spec, interpret, q, key, value, layer, q_segments, k_segments, q_slots
):
  """Returns attention of what one device has, queries padded to whole tiles."""
  batch, length, heads, width = q.shape
  # The cache may have room behind the slots of its segments.
  layers, _, groups, room, _ = key.shape
  slots = k_segments.shape[1]
  rows = min(_ROWS, max(_LEAST_TILE, 1 << (length - 1).bit_length()))
  tile = math.gcd(slots, _TILE)
  # No key has the segment of what pads the queries.
  more = (0, -length % rows)
  pad = lambda x, by=0: jnp.pad(x, [(0, 0), more], constant_values=by)
  queries = jnp.pad(q, [(0, 0), more, (0, 0), (0, 0)])
  last = jnp.max(jnp.where(k_segments > 0, jnp.arange(slots) + 1, 0), axis=1)
  tiles = -(-last // tile).astype(jnp.int32)
  repeat = heads // groups
  query = pl.BlockSpec((None, rows, None, width), lambda i, h, b: (b, i, h, 0))
  kept = pl.BlockSpec(
    (layers, None, None, room, width),
    lambda i, h, b: (0, b, h // repeat, 0, 0),
  )
  by_query = pl.BlockSpec((None, rows), lambda i, h, b: (b, i))
  kernel = functools.partial(_kernel, spec=spec, tile=tile, scale=width**-0.5)
  out = pl.pallas_call(
    kernel,
    grid=(queries.shape[1] // rows, heads, batch),
    in_specs=[
      pl.BlockSpec((1,), lambda i, h, b: (0,)),
      pl.BlockSpec((1,), lambda i, h, b: (b,)),
      by_query,
      by_query,
      pl.BlockSpec((None, slots), lambda i, h, b: (b, 0)),
      query,
      kept,
      kept,
    ],
    out_specs=query,
    out_shape=jax.ShapeDtypeStruct(queries.shape, q.dtype),
    compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
    interpret=interpret,
    name=NAME,
  )(
    layer, tiles, pad(q_slots), pad(q_segments, -1), k_segments,
    queries, key, value,
  )  # fmt: skip
  return out[:, :length]


def _kernel(
  layer, tiles, q_slots, q_segments, k_segments, q, k, v, out,
  *, spec, tile, scale,
):  # fmt: skip
  query, slots, segments = q[...], q_slots[...], q_segments[...]
  here = layer[0]

  def visit(j, carry):
    top, total, mixed = carry
    at = pl.ds(j * tile, tile)
    key, value = k[here, at, :], v[here, at, :]
    s = jnp.dot(
      query, key.astype(query.dtype).T, preferred_element_type=jnp.float32
    )
    s *= scale * math.log2(math.e)
    k_slots = j * tile + jnp.arange(tile)
    allowed = spec.allowed(slots[:, None], k_slots[None, :])
    allowed &= segments[:, None] == k_segments[at][None, :]
    s = jnp.where(allowed, s, MASKED)
    new = jnp.maximum(top, jnp.max(s, axis=1))
    p, shrink = jnp.exp2(s - new[:, None]), jnp.exp2(top - new)
    more = jnp.dot(
      p.astype(query.dtype),
      value.astype(query.dtype),
      preferred_element_type=jnp.float32,
    )
    return (
      new,
      total * shrink + jnp.sum(p, axis=1),
      (mixed * shrink[:, None] + more),
    )

  rows = q.shape[0]
  carry = (
    jnp.full((rows,), _LEAST, jnp.float32),
    jnp.zeros((rows,), jnp.float32),
    jnp.zeros(q.shape, jnp.float32),
  )
  top, total, mixed = lax.fori_loop(0, tiles[0], visit, carry)
  total = jnp.where(total == 0.0, 1.0, total)
  out[...] = (mixed / total[:, None]).astype(out.dtype)

r"""Attention on GPUs to keys and values where they are kept: none is copied.

FlashAttention-2 (arXiv:2307.08691) in a Pallas kernel that is given the cache of
all layers and a layer's number. A program reads one head's keys and values of one
row once, for some queries; no scores are in memory. Slots behind a row's last
segment are not read. Where the cache has only what came before, as of a canvas
that is not written, the call's own keys and values are a second part of one
softmax.

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

from dllm_jax.core.axes import axis_size, CONTEXT, platform, shares
from dllm_jax.core.mask import MaskSpec, TwoStream
from dllm_jax.core.types import KVCache
from dllm_jax.models.attention.scores import MASKED

_ROWS, _TILE = 64, 64  # queries and keys of a tile, at most
_LEAST_TILE = 16  # what a product of tiles has at least
_HEAD = 128  # wider heads have smaller tiles of keys, and twice the warps
# Above `MASKED`, below every score: exp2(MASKED - _LEAST) is 0, not 1.
_LEAST = -1e20

NAME = "flash_kept"
"""By which a plan knows the kernel."""


def chosen(implementation: str | None) -> bool:
  """Returns whether an implementation of attention reads caches by the kernel."""
  return implementation in ("cudnn", "flash") and platform() not in (
    "cpu",
    "tpu",
  )


def fits(cache: KVCache, spec: MaskSpec) -> bool:
  """Returns whether the kernel can read a cache.

  It wants a mask by slots, heads as wide as a power of 2, 16 slots or more, and
  positions that no devices divide.
  """
  slots, width = cache.segment_ids.shape[1], cache.key.shape[4]
  return (
    not isinstance(spec, TwoStream)
    and width >= _LEAST_TILE
    and not width & (width - 1)
    and slots >= _LEAST_TILE
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
  own: tuple[Float[Array, "B T G K"], Float[Array, "B T G K"]] | None = None,
  interpret: bool = False,
) -> Float[Array, "B T H K"]:
  """Returns softmax(q k^T / sqrt(K)) v over the kept keys of a layer.

  Args:
    q: rotated queries.
    cache: of all layers, the queries' own keys and values written, unless `own`
      are given.
    layer: the layer's number.
    mask: who attends to whom, by slot.
    q_segments: the segment of each query; a query sees its own segment only.
    k_segments: the segment of each slot; 0 hides it from every real query.
    q_slots: the slot of each query.
    own: keys and values of the queries' own positions, which see each other if
      their segments are the same; None if the cache has them.
    interpret: whether the kernel runs step by step, off a GPU.

  Returns:
    The mixed values, in the type of q; zeros for a query whose keys are all
    forbidden.
  """
  run = functools.partial(_here, mask, interpret)
  arrays = (q, cache.key, cache.value, layer[None])
  arrays += (q_segments, k_segments, jnp.broadcast_to(q_slots, q.shape[:2]))
  arrays += own or ()
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return run(*arrays)
  rows, tensor = shares(q.shape[0], cache.key.shape[2])
  # Fewer rows than the cache has are no equal shares of its rows.
  rows = rows if q.shape[0] == cache.key.shape[1] else None
  heads, kept, by_row = (
    jax.P(rows, None, tensor), jax.P(None, rows, tensor), jax.P(rows),
  )  # fmt: skip
  return jax.shard_map(
    run,
    in_specs=(
      heads, kept, kept, jax.P(), by_row, by_row, by_row,
      *[heads for _ in own or ()],
    ),
    out_specs=heads,
    check_vma=False,
  )(*arrays)  # fmt: skip


def _here(
  spec, interpret, q, key, value, layer, q_segments, k_segments, q_slots, *own
):
  """Returns attention of what one device has, queries padded to whole tiles."""
  batch, length, heads, width = q.shape
  # The cache may have room behind the slots of its segments.
  layers, _, groups, room, _ = key.shape
  slots = k_segments.shape[1]
  rows = min(_ROWS, max(_LEAST_TILE, 1 << (length - 1).bit_length()))
  most = min(_TILE, max(_LEAST_TILE, _TILE * _HEAD // width))
  tile = min(most, 1 << (slots.bit_length() - 1))
  # No key has the segment of what pads the queries.
  pad = lambda x, to, by=0: jnp.pad(
    x, [(0, 0), (0, -length % to), *[(0, 0)] * (x.ndim - 2)], constant_values=by
  )
  queries = pad(q, rows)
  last = jnp.max(jnp.where(k_segments > 0, jnp.arange(slots) + 1, 0), axis=1)
  tiles = -(-last // tile).astype(jnp.int32)
  repeat = heads // groups
  query = pl.BlockSpec((None, rows, None, width), lambda i, h, b: (b, i, h, 0))
  kept = pl.BlockSpec(
    (layers, None, None, room, width),
    lambda i, h, b: (0, b, h // repeat, 0, 0),
  )
  by_query = pl.BlockSpec((None, rows), lambda i, h, b: (b, i))
  arrays = [
    layer, tiles, pad(q_slots, rows), pad(q_segments, rows, -1), k_segments,
    queries, key, value,
  ]  # fmt: skip
  specs = [
    pl.BlockSpec((1,), lambda i, h, b: (0,)),
    pl.BlockSpec((1,), lambda i, h, b: (b,)),
    by_query,
    by_query,
    pl.BlockSpec((None, slots), lambda i, h, b: (b, 0)),
    query,
    kept,
    kept,
  ]
  if own:
    # No query has the segment of what pads the keys.
    near = [pad(q_segments, most, -2), *(pad(x, most) for x in own)]
    ours = near[0].shape[1]
    head = pl.BlockSpec(
      (None, ours, None, width), lambda i, h, b: (b, 0, h // repeat, 0)
    )
    arrays += near
    specs += [pl.BlockSpec((None, ours), lambda i, h, b: (b, 0)), head, head]
  kernel = functools.partial(
    _kernel, spec=spec, tile=tile, own_tile=most, scale=width**-0.5
  )
  out = pl.pallas_call(
    kernel,
    grid=(queries.shape[1] // rows, heads, batch),
    in_specs=specs,
    out_specs=query,
    out_shape=jax.ShapeDtypeStruct(queries.shape, q.dtype),
    compiler_params=triton.CompilerParams(
      num_warps=4 if width <= _HEAD else 8, num_stages=2
    ),
    interpret=interpret,
    name=NAME,
  )(*arrays)
  return out[:, :length]


def _kernel(
  layer, tiles, q_slots, q_segments, k_segments, q, k, v, *rest,
  spec, tile, own_tile, scale,
):  # fmt: skip
  *own, out = rest
  query, slots, segments = q[...], q_slots[...], q_segments[...]
  here, places = layer[0], k_segments.shape[0]

  def kept(j):
    # The last tile may begin within the one before it.
    first = jnp.minimum(j * tile, places - tile) if places % tile else j * tile
    at = pl.ds(first, tile)
    k_slots = first + jnp.arange(tile)
    allowed = spec.allowed(slots[:, None], k_slots[None, :])
    allowed &= segments[:, None] == k_segments[at][None, :]
    allowed &= (k_slots >= j * tile)[None, :]
    return k[here, at, :], v[here, at, :], allowed

  def near(j):
    at = pl.ds(j * own_tile, own_tile)
    own_segments, own_k, own_v = own
    allowed = segments[:, None] == own_segments[at][None, :]
    return own_k[at, :], own_v[at, :], allowed

  def visit(part, j, carry):
    top, total, mixed = carry
    key, value, allowed = part(j)
    s = jnp.dot(
      query, key.astype(query.dtype).T, preferred_element_type=jnp.float32
    )
    s *= scale * math.log2(math.e)
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
  over = lambda part, count, carry: lax.fori_loop(
    0, count, functools.partial(visit, part), carry
  )
  carry = over(kept, tiles[0], carry)
  if own:
    carry = over(near, own[0].shape[0] // own_tile, carry)
  top, total, mixed = carry
  total = jnp.where(total == 0.0, 1.0, total)
  out[...] = (mixed / total[:, None]).astype(out.dtype)

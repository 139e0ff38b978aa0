r"""Attention on GPUs by tiles of the mask: what it forbids costs nothing.

FlashAttention-2 (arXiv:2307.08691) in Pallas kernels. Tiles of scores are of
three kinds, by mask spec and segments together: those that are empty are left out
of the lists that the kernels walk over, those that are whole need no mask, and in
the others it is evaluated from slot and segment numbers. No mask is ever an array
of the size of the scores, and neither are the scores:

    TwoStream   z  x0       Full, two documents and padding
            z   \  .               # # . . .     # whole
            z   .\ #.              # \ \ . .     \ in part
            x0     \               . \ # . .     . empty
            x0     #\              . . . \ \

A query whose keys are all forbidden gets zeros. Imported for
`dllm_jax.models.attention` alone.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
import jax.numpy as jnp
import numpy as np

from dllm_jax.core.axes import axis_size, CONTEXT, platform
from dllm_jax.core.mask import Full, MaskSpec
from dllm_jax.models.attention import context as divided
from dllm_jax.models.attention.scores import MASKED
from dllm_jax.models.layers import PRODUCT

# Queries and keys of a tile: forward and for queries' gradients, and for keys'.
_FORWARD, _BACKWARD = (128, 64), (64, 128)
_MULTIPLE = 128
_EMPTY, _PART, _WHOLE = 0, 1, 2
# Above `MASKED`, below every score: exp2(MASKED - _LEAST) is 0, not 1.
_LEAST = -1e20


class _Options(NamedTuple):
  """What is known when a program is traced.

  Attributes:
    spec: the mask.
    length: queries, over all devices.
    interpret: whether kernels run step by step, off a GPU.
  """

  spec: MaskSpec
  length: int
  interpret: bool


def attention(q, k, v, spec, q_segments, k_segments, *, interpret=False):
  """Returns attention by the kernels of tiles; arguments as in `attention`.

  Raises:
    ValueError: off a GPU, or where several devices divide the positions and a
      device's share is not a multiple of 128.
  """
  if not interpret and platform() in ("cpu", "tpu"):
    raise ValueError(
      f"attention 'flash' needs a GPU, not {platform()}; use 'xla'"
    )
  length = q.shape[1]
  if divided.divides(length) and length % (_MULTIPLE * axis_size(CONTEXT)):
    raise ValueError(
      f"attention 'flash' needs a multiple of {_MULTIPLE} positions on each"
      f" device, not {length} over {axis_size(CONTEXT)}; use 'xla'"
    )
  options = _Options(spec, length, interpret)

  def local(q, k, v, q_segments, k_segments):
    first = jnp.zeros((), jnp.int32)
    if q.shape[1] < length:
      first = divided.first_slot(q.shape[1])
      k, v, k_segments = divided.all_keys(k, v, k_segments)
    return _attend(options, q, k, v, q_segments, k_segments, first)

  return divided.placed(local)(q, k, v, q_segments, k_segments)


def here(spec, q, k, v, q_segments, k_segments):
  """Returns attention of what one device has, whose first query is in slot 0."""
  options = _Options(spec, q.shape[1], False)
  first = jnp.zeros((), jnp.int32)
  return _attend(options, q, k, v, q_segments, k_segments, first)


def visited(spec: MaskSpec, length: int) -> float:
  """Returns the share of all places that lie in tiles which are not empty."""
  whole = length + -length % _MULTIPLE
  return float(np.mean(kinds(spec, (whole, whole), _FORWARD) != _EMPTY))


def _attend(options, q, k, v, q_segments, k_segments, first):
  """Returns attention after padding to whole tiles and powers of 2."""
  length, width = q.shape[1], q.shape[3]
  wide = max(16, 1 << (width - 1).bit_length())

  def pad(x, segment=None):
    sizes = [(0, 0)] * x.ndim
    sizes[1] = (0, -x.shape[1] % _MULTIPLE)
    if segment is None:
      sizes[3] = (0, wide - width)
    return jnp.pad(x, sizes, constant_values=segment or 0)

  # No query of a row has the segment of what pads the keys, nor one another's.
  out = _flash(
    options, width, pad(q), pad(k), pad(v),
    pad(q_segments, -1), pad(k_segments, -2), first,
  )  # fmt: skip
  return out[:, :length, :, :width]


# ------------------------------------------------------------------ tiles


@functools.lru_cache(64)
def kinds(
  spec: MaskSpec, size: tuple[int, int], tile: tuple[int, int]
) -> np.ndarray:
  """Returns the kind of each tile by the mask alone, `[queries, keys]` in tiles."""
  k = np.arange(size[1])
  found = np.empty((size[0] // tile[0], size[1] // tile[1]), np.int32)
  for row, q in enumerate(np.split(np.arange(size[0]), found.shape[0])):
    allowed = np.ones((q.size, k.size), bool)
    if not isinstance(spec, Full):
      allowed &= spec.allowed(q[:, None], k[None, :])
    allowed = allowed.reshape(q.size, -1, tile[1])
    found[row] = np.where(allowed.all((0, 2)), _WHOLE, allowed.any((0, 2)))
  return found


def _lists(options, tile, q_segments, k_segments, first):
  """Returns the kinds of tiles of each row, segments included, `[B, q, k]`."""
  size = options.length + -options.length % _MULTIPLE, k_segments.shape[1]
  found = jnp.asarray(kinds(options.spec, size, tile))
  here = q_segments.shape[1] // tile[0]
  found = lax.dynamic_slice_in_dim(found, first // tile[0], here)

  def ends(segments, tile):
    cut = segments.reshape(segments.shape[0], -1, tile)
    return jnp.min(cut, -1), jnp.max(cut, -1)

  q_low, q_high = (x[:, :, None] for x in ends(q_segments, tile[0]))
  k_low, k_high = (x[:, None, :] for x in ends(k_segments, tile[1]))
  apart = (q_low > k_high) | (q_high < k_low)
  one = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
  found = jnp.where(one, found, jnp.minimum(found, _PART))
  return jnp.where(apart, _EMPTY, found)


def _walk(found):
  """Returns whole tiles and then parts by number, and where each kind ends."""
  order = jnp.argsort(-found, axis=-1, stable=True).astype(jnp.int32)
  whole = jnp.sum(found == _WHOLE, -1)
  ends = jnp.stack([whole, jnp.sum(found != _EMPTY, -1)], -1)
  return ends.astype(jnp.int32), order


# ---------------------------------------------------------------- kernels


def _dot(a, b):
  return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _each(visit, ends, tiles, carry):
  """Returns carry after visit(carry, tile, masked) of every tile of a list."""
  whole = lambda n, carry: visit(carry, tiles[n], False)
  part = lambda n, carry: visit(carry, tiles[n], True)
  carry = lax.fori_loop(0, ends[0], whole, carry)
  return lax.fori_loop(ends[0], ends[1], part, carry)


def _forward_kernel(
  first, ends, tiles, q_segments, k_segments, q, k, v, out, lse, *, spec, scale
):
  rows, (_, tile) = q.shape[0], _FORWARD
  q_slots = first[0] + pl.program_id(0) * rows + jnp.arange(rows)
  query, segments = q[...], q_segments[...]

  def visit(carry, j, masked):
    top, total, mixed = carry
    at = pl.ds(j * tile, tile)
    s = _dot(query, k[at, :].T) * (scale * math.log2(math.e))
    if masked:
      k_slots = j * tile + jnp.arange(tile)
      allowed = spec.allowed(q_slots[:, None], k_slots[None, :])
      allowed &= segments[:, None] == k_segments[at][None, :]
      s = jnp.where(allowed, s, MASKED)
    new = jnp.maximum(top, jnp.max(s, axis=1))
    p, shrink = jnp.exp2(s - new[:, None]), jnp.exp2(top - new)
    mixed = mixed * shrink[:, None] + _dot(p.astype(v.dtype), v[at, :])
    return new, total * shrink + jnp.sum(p, axis=1), mixed

  carry = (
    jnp.full((rows,), _LEAST, jnp.float32),
    jnp.zeros((rows,), jnp.float32),
    jnp.zeros(q.shape, jnp.float32),
  )
  top, total, mixed = _each(visit, ends, tiles, carry)
  total = jnp.where(total == 0.0, 1.0, total)
  out[...] = (mixed / total[:, None]).astype(out.dtype)
  lse[...] = top + jnp.log2(total)


def _query_kernel(
  first, ends, tiles, q_segments, k_segments, q, k, v, d_out, lse, delta, d_q,
  *, spec, scale,
):  # fmt: skip
  rows, (_, tile) = q.shape[0], _FORWARD
  q_slots = first[0] + pl.program_id(0) * rows + jnp.arange(rows)
  query, segments, d_mixed = q[...], q_segments[...], d_out[...]
  log_sum, mean = lse[...][:, None], delta[...][:, None]

  def visit(total, j, masked):
    at = pl.ds(j * tile, tile)
    key = k[at, :]
    s = _dot(query, key.T) * (scale * math.log2(math.e))
    p = jnp.exp2(s - log_sum)
    if masked:
      k_slots = j * tile + jnp.arange(tile)
      allowed = spec.allowed(q_slots[:, None], k_slots[None, :])
      allowed &= segments[:, None] == k_segments[at][None, :]
      p = jnp.where(allowed, p, 0.0)
    d_s = p * (_dot(d_mixed, v[at, :].T) - mean)
    return total + _dot(d_s.astype(key.dtype), key)

  zeros = jnp.zeros(q.shape, jnp.float32)
  d_q[...] = (_each(visit, ends, tiles, zeros) * scale).astype(d_q.dtype)


def _key_kernel(
  first, ends, tiles, q_segments, k_segments, q, k, v, d_out, lse, delta,
  d_k, d_v, *, spec, scale,
):  # fmt: skip
  """Walks over the queries of all heads of a group; scores are transposed."""
  rows, (tile, _) = k.shape[0], _BACKWARD
  k_slots = pl.program_id(0) * rows + jnp.arange(rows)
  key, value, segments = k[...], v[...], k_segments[...]

  def head(r, carry):
    def visit(carry, i, masked):
      at = pl.ds(i * tile, tile)
      query, d_mixed = q[at, r, :], d_out[at, r, :]
      s = _dot(key, query.T) * (scale * math.log2(math.e))
      p = jnp.exp2(s - lse[r, at][None, :])
      if masked:
        q_slots = first[0] + i * tile + jnp.arange(tile)
        allowed = spec.allowed(q_slots[None, :], k_slots[:, None])
        allowed &= segments[:, None] == q_segments[at][None, :]
        p = jnp.where(allowed, p, 0.0)
      d_s = p * (_dot(value, d_mixed.T) - delta[r, at][None, :])
      d_key = carry[0] + _dot(d_s.astype(query.dtype), query)
      return d_key, carry[1] + _dot(p.astype(d_mixed.dtype), d_mixed)

    return _each(visit, ends, tiles, carry)

  zeros = jnp.zeros(k.shape, jnp.float32)
  d_key, d_value = lax.fori_loop(0, q.shape[1], head, (zeros, zeros))
  d_k[...] = (d_key * scale).astype(d_k.dtype)
  d_v[...] = d_value.astype(d_v.dtype)


# ------------------------------------------------------------------ calls


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(options, width, q, k, v, q_segments, k_segments, first):
  return _forward(options, width, q, k, v, q_segments, k_segments, first)[0]


def _call(kernel, options, width, grid, in_specs, out_specs, out_shape, name):
  return pl.pallas_call(
    functools.partial(kernel, spec=options.spec, scale=width**-0.5),
    grid=grid,
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=out_shape,
    compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
    interpret=options.interpret,
    name=name,
  )


def _by_query(k, repeat: int):
  """Returns the grid's BlockSpecs for (tile, head, row) of queries."""
  (rows, _), (_, length, _, wide) = _FORWARD, k.shape
  query = pl.BlockSpec((None, rows, None, wide), lambda i, h, b: (b, i, h, 0))
  keys = pl.BlockSpec(
    (None, length, None, wide), lambda i, h, b: (b, 0, h // repeat, 0)
  )
  stat = pl.BlockSpec((None, None, rows), lambda i, h, b: (b, h, i))
  lists = [
    pl.BlockSpec((1,), lambda i, h, b: (0,)),
    pl.BlockSpec((None, None, 2), lambda i, h, b: (b, i, 0)),
    pl.BlockSpec(
      (None, None, length // _FORWARD[1]), lambda i, h, b: (b, i, 0)
    ),
    pl.BlockSpec((None, rows), lambda i, h, b: (b, i)),
    pl.BlockSpec((None, length), lambda i, h, b: (b, 0)),
  ]
  return lists, query, keys, stat


def _forward(options, width, q, k, v, q_segments, k_segments, first):
  """Returns the mixed values, and what gradients need."""
  batch, length, heads, _ = q.shape
  found = _lists(options, _FORWARD, q_segments, k_segments, first)
  lists, query, keys, stat = _by_query(k, heads // k.shape[2])
  out, lse = _call(
    _forward_kernel,
    options,
    width,
    (length // _FORWARD[0], heads, batch),
    [*lists, query, keys, keys],
    [query, stat],
    [
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
    ],
    "flash_forward",
  )(first[None], *_walk(found), q_segments, k_segments, q, k, v)
  out, lse = checkpoint_name(out, PRODUCT), checkpoint_name(lse, PRODUCT)
  return out, (q, k, v, q_segments, k_segments, first, out, lse)


def _backward(options, width, saved, d_out):
  """Returns the gradients of queries, keys and values."""
  q, k, v, q_segments, k_segments, first, out, lse = saved
  batch, length, heads, wide = q.shape
  groups, repeat = k.shape[2], heads // k.shape[2]
  delta = jnp.einsum(
    "bthk,bthk->bht", d_out, out, preferred_element_type=jnp.float32
  )
  lists, query, keys, stat = _by_query(k, repeat)
  found = _lists(options, _FORWARD, q_segments, k_segments, first)
  d_q = _call(
    _query_kernel,
    options,
    width,
    (length // _FORWARD[0], heads, batch),
    [*lists, query, keys, keys, query, stat, stat],
    query,
    jax.ShapeDtypeStruct(q.shape, q.dtype),
    "flash_backward_dq",
  )(
    first[None], *_walk(found), q_segments, k_segments,
    q, k, v, d_out, lse, delta,
  )  # fmt: skip

  rows, slots = _BACKWARD[1], k.shape[1]
  of_keys = pl.BlockSpec((None, rows, None, wide), lambda j, g, b: (b, j, g, 0))
  queries = pl.BlockSpec(
    (None, length, None, repeat, wide), lambda j, g, b: (b, 0, g, 0, 0)
  )
  stats = pl.BlockSpec(
    (None, None, repeat, length), lambda j, g, b: (b, g, 0, 0)
  )
  found = _lists(options, _BACKWARD, q_segments, k_segments, first)
  by_group = lambda x: x.reshape(batch, length, groups, repeat, wide)
  by_head = lambda x: x.reshape(batch, groups, repeat, length)
  d_k, d_v = _call(
    _key_kernel,
    options,
    width,
    (slots // rows, groups, batch),
    [
      pl.BlockSpec((1,), lambda j, g, b: (0,)),
      pl.BlockSpec((None, None, 2), lambda j, g, b: (b, j, 0)),
      pl.BlockSpec(
        (None, None, length // _BACKWARD[0]), lambda j, g, b: (b, j, 0)
      ),
      pl.BlockSpec((None, length), lambda j, g, b: (b, 0)),
      pl.BlockSpec((None, rows), lambda j, g, b: (b, j)),
      *(queries, of_keys, of_keys, queries, stats, stats),
    ],
    [of_keys, of_keys],
    [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
    "flash_backward_dkv",
  )(
    first[None], *_walk(jnp.swapaxes(found, 1, 2)), q_segments, k_segments,
    by_group(q), k, v, by_group(d_out), by_head(lse), by_head(delta),
  )  # fmt: skip
  return d_q, d_k, d_v, None, None, None


_flash.defvjp(_forward, _backward)

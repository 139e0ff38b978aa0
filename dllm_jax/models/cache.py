"""The key and value cache: empty ones, and one layer of one, written and read.

A cache is carried through the loop over layers, whole, and changed in place by
rows: what a layer is not given it neither reads nor writes. A slot is written as
often as the caller likes: caches of bidirectional models are refreshed in place.
Keys are stored rotated.
"""

import jax
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.core.axes import platform, shares
from dllm_jax.core.types import KVCache, ModelInputs

_BITS = jnp.dtype("uint16")  # of bfloat16


def empty_cache(
  *, layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype
) -> KVCache:
  """Returns a cache of zeros in which every slot is empty (segment 0).

  On CPUs bfloat16 is kept as its bits: XLA has no scatter of bfloat16 there, and
  would make the whole cache float32, and back, for a window of one layer
  (findings/xla_cpu_scatter_of_bfloat16.sh).
  """
  dtype = jnp.dtype(dtype)
  if platform() == "cpu" and dtype == jnp.bfloat16:
    dtype = _BITS
  shape = (layers, batch, kv_heads, slots, head_dim)
  return KVCache(
    key=jnp.zeros(shape, dtype),
    value=jnp.zeros(shape, dtype),
    segment_ids=jnp.zeros((batch, slots), jnp.int32),
  )


def query_slots(inputs: ModelInputs) -> Int[Array, "B T"]:
  """Returns the cache slot of each position: `slot` (or 0) and those after it."""
  rows, length = inputs.segment_ids.shape
  first = jnp.zeros(rows, jnp.int32) if inputs.slot is None else inputs.slot
  return first[:, None] + jnp.arange(length)


def fill(cache: KVCache, inputs: ModelInputs) -> KVCache:
  """Returns the cache with the segments of new positions at their slots.

  Without slots they are all that there is: those after them are empty.
  """
  old, new = cache.segment_ids, inputs.segment_ids
  (length, slots), first = (new.shape[1], old.shape[1]), inputs.slot
  if first is None:
    return cache.replace(
      segment_ids=jnp.pad(new, ((0, 0), (0, slots - length)))
    )
  at = jnp.arange(slots) - first[:, None]
  here = jnp.take_along_axis(new, jnp.clip(at, 0, length - 1), axis=1)
  inside = (at >= 0) & (at < length)
  return cache.replace(segment_ids=jnp.where(inside, here, old))


def write(
  cache: KVCache,
  layer: Int[Array, ""],
  key: Float[Array, "B T H K"],
  value: Float[Array, "B T H K"],
  slot: Int[Array, "B"] | None,
) -> KVCache:
  """Returns a cache with new keys and values in one layer.

  Args:
    cache: of all layers.
    layer: its number.
    key: new keys.
    value: new values.
    slot: the slot of each row's first position, the others follow; None for 0.
      What ends past the last slot needs room behind it; without, it is written
      further ahead, unless it is as wide as the cache: then the rest is dropped.
  """
  return cache.replace(
    key=_write(cache.key, key, layer, slot),
    value=_write(cache.value, value, layer, slot),
  )


def read(
  cache: KVCache, layer: Int[Array, ""], dtype
) -> tuple[Float[Array, "B S H K"], Float[Array, "B S H K"]]:
  """Returns the keys and values of one layer, of the rows that have segments."""
  batch, slots = cache.segment_ids.shape

  def one(kept):
    _, _, heads, _, width = kept.shape
    shape = (1, batch, heads, slots, width)
    own = lax.dynamic_slice(kept, (layer, 0, 0, 0, 0), shape)[0]
    if own.dtype == _BITS:
      own = lax.bitcast_convert_type(own, jnp.bfloat16)
    return jnp.swapaxes(own, 1, 2).astype(dtype)

  return one(cache.key), one(cache.value)


def _write(kept, new, layer, slot):
  """Returns kept `[N, B, H, S, K]` with new `[B, T, H, K]` in one layer.

  Fewer new rows than there are leave the others as they were.
  """
  new = jnp.swapaxes(new, 1, 2)
  if kept.dtype == _BITS:
    new = lax.bitcast_convert_type(new.astype(jnp.bfloat16), _BITS)
  new = new.astype(kept.dtype)
  length, slots = new.shape[2], kept.shape[3]
  if slot is not None and length < slots:
    return _scatter(kept, new, layer, jnp.minimum(slot, slots - length))
  if slot is not None:
    old = lax.dynamic_index_in_dim(kept, layer, 0, keepdims=False)
    old = old[: new.shape[0]]
    moved = jax.vmap(lambda x, by: jnp.roll(x, by, axis=1))(new, slot)
    after = jnp.arange(slots)[:, None] >= slot[:, None, None, None]
    new = jnp.where(after, moved, old)
  return lax.dynamic_update_slice(kept, new[None], (layer, 0, 0, 0, 0))


def _scatter(kept, new, layer, start):
  """Returns kept with a window of new slots in each row.

  As one operation whose only operand is the cache: compilers copy all of it to
  read what a window held, and to write its rows by way of another layout.
  """
  layer = jnp.broadcast_to(layer, start.shape)
  if len(start) < kept.shape[1]:
    at = jnp.stack([layer, jnp.arange(len(start)), start], axis=1)
    dimensions = lax.ScatterDimensionNumbers(
      update_window_dims=(1, 2, 3),
      inserted_window_dims=(0, 1),
      scatter_dims_to_operand_dims=(0, 1, 3),
    )
    return lax.scatter(
      kept, at, new, dimensions,
      indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds",
    )  # fmt: skip
  at = jnp.stack([layer, start], axis=1)
  dimensions = lax.ScatterDimensionNumbers(
    update_window_dims=(1, 2, 3),
    inserted_window_dims=(0,),
    scatter_dims_to_operand_dims=(0, 3),
    operand_batching_dims=(1,),
    scatter_indices_batching_dims=(0,),
  )
  return lax.scatter(
    kept, at, new, dimensions,
    indices_are_sorted=True, unique_indices=True, mode="promise_in_bounds",
  )  # fmt: skip


def store(
  cache: KVCache,
  keys: tuple[Float[Array, "N B H T K"], ...],
  values: tuple[Float[Array, "N B H T K"], ...],
  inputs: ModelInputs,
) -> KVCache:
  """Returns a cache of several kinds of layers with all layers of new text.

  Slot s of layers that keep R places is in place s mod R. Positions of segment 0
  change nothing, and neither do fewer rows than there are the others.

  Args:
    cache: the cache.
    keys: new keys of each kind.
    values: new values.
    inputs: where they are.
  """
  segments, slots = inputs.segment_ids, query_slots(inputs)
  real = segments > 0

  def source(places):
    """Returns the position that each place takes, -1 for none."""
    at = jnp.where(real, slots % places, places)
    none = jnp.full(places, -1, jnp.int32)
    order = jnp.arange(slots.shape[1], dtype=jnp.int32)
    latest = lambda at: none.at[at].max(order, mode="drop")
    return jax.vmap(latest)(at)

  def put(old, new):
    position = source(old.shape[3])[None, :, None, :, None]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
      return _put(old, new, position)
    rows, heads = shares(old.shape[1], old.shape[2])
    rows = rows if len(slots) == old.shape[1] else None
    kept = jax.P(None, rows, heads)
    return jax.shard_map(
      _put,
      in_specs=(kept, kept, jax.P(None, rows)),
      out_specs=kept,
      check_vma=False,
    )(old, new, position)

  def of_slots(old, new):
    position = source(old.shape[1])
    return _over(old, _taken(new, position, axis=1), position, rows=0)

  held = cache.slots
  return cache.replace(
    slots=None if held is None else of_slots(held, slots),
    key=tuple(map(put, cache.key, keys)),
    value=tuple(map(put, cache.value, values)),
    segment_ids=of_slots(cache.segment_ids, segments),
  )


def _put(old, new, position):
  """Returns old `[N, B, H, S, K]` with what positions say of new.

  Laid out as declared: of its own accord XLA gathers slot by slot, and keeps the
  whole cache so, of which kernels then read a second one. Where devices divide it
  each does so by itself: in jax 0.10 a layout that is asked for makes it whole on
  all (findings/jax_layout_constraint_gathers_shards.sh).
  """
  taken = _taken(new, position, axis=3)
  taken = with_layout_constraint(taken, Layout(tuple(range(taken.ndim))))
  return _over(old, taken, position, rows=1)


def _taken(new, position, axis: int):
  return jnp.take_along_axis(new, jnp.maximum(position, 0), axis=axis)


def _over(old, taken, position, rows: int):
  """Returns old with what was taken, where a position was, in its first rows."""
  here = lax.slice_in_dim(old, 0, taken.shape[rows], axis=rows)
  taken = jnp.where(position >= 0, taken.astype(old.dtype), here)
  if here.shape == old.shape:
    return taken
  return lax.dynamic_update_slice_in_dim(old, taken, 0, axis=rows)

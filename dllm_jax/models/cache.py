"""The key and value cache: empty ones, and one layer of one, written and read.

A cache is carried through the loop over layers, whole, and changed in place by
rows: what a layer is not given it neither reads nor writes. A slot is written as
often as the caller likes: caches of bidirectional models are refreshed in place.
Keys are stored rotated.
"""

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.core.types import KVCache, ModelInputs


def empty_cache(
  *, layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype
) -> KVCache:
  """Returns a cache of zeros in which every slot is empty (segment 0)."""
  shape = (layers, batch, kv_heads, slots, head_dim)
  return KVCache(
    key=jnp.zeros(shape, dtype),
    value=jnp.zeros(shape, dtype),
    segment_ids=jnp.zeros((batch, slots), jnp.int32),
  )


def query_slots(inputs: ModelInputs) -> Int[Array, "B T"]:
  """Returns the cache slot of each position: `slot` and those after it."""
  batch, length = inputs.segment_ids.shape
  first = jnp.zeros((batch,), jnp.int32) if inputs.slot is None else inputs.slot
  return first[:, None] + jnp.arange(length)


def fill(cache: KVCache, inputs: ModelInputs) -> KVCache:
  """Returns the cache with the segments of new positions at their slots."""
  old = cache.segment_ids[None, :, None, :, None]
  new = inputs.segment_ids[:, :, None, None]
  ids = _write(old, new, 0, inputs.slot)[0, :, 0, :, 0]
  return cache.replace(segment_ids=ids)


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
      Those past the end are dropped.
  """
  return cache.replace(
    key=_write(cache.key, key, layer, slot),
    value=_write(cache.value, value, layer, slot),
  )


def read(
  cache: KVCache, layer: Int[Array, ""], dtype
) -> tuple[Float[Array, "B S H K"], Float[Array, "B S H K"]]:
  """Returns the keys and values of one layer."""

  def one(kept):
    own = lax.dynamic_index_in_dim(kept, layer, 0, keepdims=False)
    return jnp.swapaxes(own, 1, 2).astype(dtype)

  return one(cache.key), one(cache.value)


def _write(kept, new, layer, slot):
  new = jnp.swapaxes(new, 1, 2).astype(kept.dtype)
  length, slots = new.shape[2], kept.shape[3]
  if slot is None:
    return lax.dynamic_update_slice(kept, new[None], (layer, 0, 0, 0, 0))
  # A window that ends past the end is written from where it fits: what was
  # there, then the positions that have a slot.
  start = jnp.minimum(slot, slots - length)

  def row(kept, new, start, late):
    at = layer, 0, start, 0
    old = lax.dynamic_slice(kept, at, (1, *new.shape))[0]
    moved = jnp.roll(new, late, axis=1)
    fits = jnp.arange(length)[:, None] >= late
    new = jnp.where(fits, moved, old)
    return lax.dynamic_update_slice(kept, new[None], at)

  return jax.vmap(row, in_axes=(1, 0, 0, 0), out_axes=1)(
    kept, new, start, slot - start
  )

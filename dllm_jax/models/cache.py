"""The key and value cache: empty ones, and writing into one layer of one.

A slot is written as often as the caller likes: caches of bidirectional models
are refreshed in place. Keys are stored rotated.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.core.types import KVCache, ModelInputs


def empty_cache(
  *, layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype
) -> KVCache:
  """Returns a cache of zeros in which every slot is empty (segment 0)."""
  shape = (layers, batch, slots, kv_heads, head_dim)
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


def write(
  old: Float[Array, "B S *rest"],
  new: Float[Array, "B T *rest"],
  slots: Int[Array, "B T"],
) -> Float[Array, "B S *rest"]:
  """Returns old with new in the given slots; slots past the end are dropped."""
  rows = jnp.arange(old.shape[0])[:, None]
  return old.at[rows, slots].set(
    new.astype(old.dtype), mode="drop", unique_indices=True
  )

"""The key and value cache: what is written where, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.mask import Full
from dllm_jax.core.types import KVCache, ModelInputs
from dllm_jax.models import cache as caches

LAYERS, ROWS, HEADS, SLOTS, WIDTH = 3, 2, 2, 6, 4


def kept(room=0):
  rng = np.random.default_rng(0)
  shape = LAYERS, ROWS, HEADS, SLOTS + room, WIDTH
  key, value = rng.normal(size=(2, *shape)).astype(np.float32)
  ids = np.array([[1] * 6, [1] * 4 + [0] * 2], np.int32)
  return KVCache(key=key, value=value, segment_ids=ids)


def new(length):
  rng = np.random.default_rng(1)
  shape = (2, ROWS, length, HEADS, WIDTH)
  return rng.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
  "length, room, slot",
  [
    (2, 0, [0, 4]),
    (2, 2, [5, 1]),  # ends past the last slot
    (2, 2, [90, 3]),  # lies past it
    (6, 0, None),
    (6, 0, [0, 2]),  # as wide as the cache
  ],
)
def test_windows_are_written_at_their_slots_in_one_layer(length, room, slot):
  cache, (key, value) = kept(room), new(length)
  first = None if slot is None else jnp.asarray(slot)
  written = jax.jit(caches.write)(cache, jnp.int32(1), key, value, first)
  read = jax.jit(lambda cache: caches.read(cache, jnp.int32(1), jnp.float32))
  pairs = ((cache.key, key, written.key), (cache.value, value, written.value))
  for (old, fresh, found), mine in zip(pairs, read(written), strict=True):
    expected = old.copy()
    for row in range(ROWS):
      for t in range(length):
        at = t + (slot[row] if slot else 0)
        if at < SLOTS:
          expected[1, row, :, at] = fresh[row, t]
    np.testing.assert_array_equal(
      found[:, :, :, :SLOTS], expected[:, :, :, :SLOTS]
    )
    np.testing.assert_array_equal(
      mine, np.swapaxes(expected[1, :, :, :SLOTS], 1, 2)
    )


@pytest.mark.parametrize(
  "slot, expected",
  [
    (None, [[2, 2, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0]]),
    ([5, 3], [[1, 1, 1, 1, 1, 2], [1, 1, 1, 2, 0, 0]]),
  ],
)
def test_segments_are_those_of_the_new_positions(slot, expected):
  inputs = ModelInputs(
    latent=np.zeros((ROWS, 2), np.int32),
    segment_ids=np.array([[2, 2], [2, 0]], np.int32),
    positions=np.zeros((ROWS, 2), np.int32),
    mask=Full(),
    slot=None if slot is None else jnp.asarray(slot),
  )
  found = caches.fill(jax.tree.map(jnp.asarray, kept()), inputs)
  np.testing.assert_array_equal(found.segment_ids, expected)

"""The key and value cache: what is written where, and what it costs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.mask import Full
from dllm_jax.core.types import KVCache, ModelInputs
from dllm_jax.models import cache as caches
from dllm_jax.parallel import make_mesh

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


def stored(fewer: int):
  """Returns a cache of two kinds, new text of its first rows, and both after."""
  rng = np.random.default_rng(2)
  draw = lambda rows, slots: jnp.asarray(
    rng.normal(size=(LAYERS, rows, HEADS, slots, WIDTH)), jnp.float32
  )
  cache = KVCache(
    key=(draw(4, 5), draw(4, 12)),
    value=(draw(4, 5), draw(4, 12)),
    segment_ids=jnp.ones((4, 12), jnp.int32),
    slots=jnp.full((4, 5), -1, jnp.int32),
  )
  rows = 4 - fewer
  real = np.ones((rows, 3), np.int32)
  real[1, 2] = 0
  inputs = ModelInputs(
    latent=jnp.zeros((rows, 3), jnp.int32),
    segment_ids=jnp.asarray(real),
    positions=jnp.zeros((rows, 3), jnp.int32),
    mask=Full(),
    slot=jnp.arange(3, 3 + rows),
  )
  keys, values = ([draw(rows, 3), draw(rows, 3)] for _ in range(2))
  return cache, (tuple(keys), tuple(values), inputs)


@pytest.mark.parametrize("fewer", [0, 2])
def test_text_is_stored_in_the_places_of_each_kind(fewer):
  cache, new = stored(fewer)
  keys, _, inputs = new
  found = jax.jit(caches.store)(cache, *new)
  for kind, places in enumerate((5, 12)):
    expected = np.array(cache.key[kind])
    for row, real in enumerate(inputs.segment_ids):
      for t in np.flatnonzero(real):
        at = (3 + row + t) % places
        expected[:, row, :, at] = keys[kind][:, row, :, t]
    np.testing.assert_array_equal(found.key[kind], expected)
  slots = np.full((4, 5), -1)
  for row, real in enumerate(inputs.segment_ids):
    for t in np.flatnonzero(real):
      slots[row, (3 + row + t) % 5] = 3 + row + t
  np.testing.assert_array_equal(found.slots, slots)


def test_devices_that_divide_a_cache_send_nothing_to_store_text():
  cache, new = stored(fewer=0)
  mesh = make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
  spec = lambda x: jax.P(
    *((None, "data", "tensor") if x.ndim == 5 else ("data",))
  )
  place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, spec(x)))
  with jax.set_mesh(mesh):
    program = jax.jit(
      caches.store,
      out_shardings=jax.tree.map(lambda x: place(x).sharding, cache),
    ).lower(*jax.tree.map(place, (cache, *new)))
    program = program.compile()
    found = program(*jax.tree.map(place, (cache, *new)))
  assert not re.search("all-gather|all-reduce|all-to-all", program.as_text())
  expected = jax.jit(caches.store)(cache, *new)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_half_the_bits_are_written_and_read_as_such():
  """On CPUs a cache of bfloat16 is one of bits, which say the same."""
  fields = {"layers": 2, "batch": ROWS, "slots": SLOTS, "kv_heads": 2}
  layer, slot = jnp.int32(1), jnp.arange(ROWS)
  found = {}
  for dtype in ("bfloat16", "float32"):
    cache = caches.empty_cache(**fields, head_dim=4, dtype=dtype)
    rows = jax.random.normal(jax.random.key(0), (ROWS, 2, 2, 4), "bfloat16")
    for at in (None, slot):
      cache = caches.write(cache, layer, rows, -rows / 3, at)
    found[dtype] = cache, caches.read(cache, layer, "float32")
  assert found["bfloat16"][0].key.dtype.itemsize == 2
  half, whole = (read for _, read in found.values())
  np.testing.assert_array_equal(half, whole)
  assert np.count_nonzero(whole) > 4 * ROWS

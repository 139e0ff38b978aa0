"""The kernel that reads a cache where it lies, step by step, without a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.mask import BlockCausal, Causal, Full, Sliding, TwoStream
from dllm_jax.core.types import KVCache
from dllm_jax.models.attention import kept, past
from dllm_jax.models.attention.dispatch import cached_attention
from dllm_jax.parallel import make_mesh
from tests.jaxprs import larger_than
from tests.models.attention.test_flash import agree, an_h100
from tests.quick import long

LAYERS, GROUPS, SLOTS, WIDTH = 3, 2, 48, 16


def draw(rows=2, length=12, heads=4, room=0):
  """Returns queries, a cache with room behind its slots, and where they are.

  Row 0 ends in padding, of queries too; row 1 begins with another document.
  """
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  shape = (LAYERS, rows, GROUPS, SLOTS + room, WIDTH)
  segments = np.ones((rows, SLOTS), np.int32)
  segments[::2, 40:], segments[1::2, :7], segments[1::2, 30:] = 0, 2, 0
  first = np.where(np.arange(rows) % 2, 10, 28)
  mine = np.ones((rows, length), np.int32)
  mine[::2, -2:] = 0
  cache = KVCache(
    key=normal(*shape), value=normal(*shape), segment_ids=segments
  )
  where = {
    "q_segments": mine,
    "k_segments": segments,
    "q_slots": first[:, None] + np.arange(length),
  }
  return normal(rows, length, heads, WIDTH), cache, where


def both(spec, q, cache, where):
  """Returns the kernel's values of layer 1 and the reference's."""

  def run(q, cache, where):
    layer = jnp.asarray(1)
    own = kept.attention(q, cache, layer, mask=spec, interpret=True, **where)
    return own, cached_attention(q, cache, layer, mask=spec, **where)

  own, expected = jax.device_get(jax.jit(run)(q, cache, where))
  real = where["q_segments"] > 0  # padded queries mean nothing
  return own[real], expected[real]


@pytest.mark.parametrize("spec, room, length, heads", [
    (BlockCausal(8), 16, 12, 4),
    long(Full(), 0, 12, 2),
    long(Causal(), 0, 1, 4),
    long(Sliding(5), 16, 12, 4),
], ids=str)  # fmt: skip
def test_the_kernel_equals_the_reference(spec, room, length, heads):
  q, cache, where = draw(length=length, heads=heads, room=room)
  agree(*both(spec, q, cache, where))


def test_slots_behind_the_last_segment_are_not_read():
  q, cache, where = draw()
  own, _ = both(Full(), q, cache, where)
  # Row 0 ends within the third tile of 16, row 1 with the second.
  broken = cache.value.copy()
  broken[:, 1, :, 32:] = np.nan
  again, _ = both(Full(), q, cache.replace(value=broken), where)
  np.testing.assert_array_equal(again, own)


def canvas(monkeypatch, q, cache, own, where):
  """Returns the kernel's values of a canvas that is not written, the reference's."""
  mine, held = where["q_segments"], where["k_segments"]
  alike = mine[:, :, None] == mine[:, None], mine[:, :, None] == held[:, None]
  sight = past.Sight(*alike, (mine, held))
  monkeypatch.setattr(kept, "chosen", lambda name: name == "flash")
  step = functools.partial(kept.attention, interpret=True)
  monkeypatch.setattr(kept, "attention", step)

  def run(q, cache, own, sight):
    one = past.Past(cache.key, cache.value, jnp.asarray(1))
    return [
      past.attention(q, *own, one, sight, name) for name in ("flash", None)
    ]

  found = jax.device_get(jax.jit(run)(q, cache, own, sight))
  return [x[mine > 0] for x in found]


@pytest.mark.parametrize("slots", [48, 37])
def test_a_canvas_and_what_it_reads_are_one_softmax(monkeypatch, slots):
  """The last tile of 37 slots begins within the one before it."""
  q, cache, where = draw(rows=4, length=21)
  where["k_segments"] = where["k_segments"][:, :slots]
  short = lambda x: x[:, :, :, :slots]
  cache = cache.replace(key=short(cache.key), value=short(cache.value))
  own = np.random.default_rng(1).normal(size=(2, 4, 21, GROUPS, WIDTH))
  args = q, cache, own.astype(np.float32), where
  alone = canvas(monkeypatch, *args)
  agree(*alone)
  mesh = make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
  with jax.set_mesh(mesh):
    agree(canvas(monkeypatch, *args)[0], alone[1])


def test_rows_that_see_nothing_of_a_cache_see_themselves(monkeypatch):
  q, cache, where = draw()
  where["k_segments"] = np.zeros_like(where["k_segments"])
  own = np.random.default_rng(1).normal(size=(2, 2, 12, GROUPS, WIDTH))
  agree(*canvas(monkeypatch, q, cache, own.astype(np.float32), where))


@pytest.mark.all
def test_the_kernel_over_rows_and_heads_that_devices_divide():
  q, cache, where = draw(rows=4)
  expected = both(Full(), q, cache, where)[0]
  mesh = make_mesh({"data": 2, "tensor": 2}, jax.devices()[:4])
  with jax.set_mesh(mesh):
    agree(both(Full(), q, cache, where)[0], expected)


@pytest.mark.all
def test_fewer_rows_than_the_cache_has_are_the_first_ones():
  q, cache, where = draw(rows=4)
  expected = both(Full(), q, cache, where)[0]
  few = {name: x[:2] for name, x in where.items()}
  short = cache.replace(segment_ids=cache.segment_ids[:2])
  own, reference = both(Full(), q[:2], short, few)
  agree(own, expected[: len(own)])
  agree(own, reference)


def test_what_the_kernel_cannot_read_goes_to_the_reference():
  _, cache, _ = draw()
  assert kept.fits(cache, Full())
  assert not kept.fits(cache, TwoStream(24, 8))
  few = cache.replace(segment_ids=cache.segment_ids[:, :15])
  assert not kept.fits(few, Full())
  wide = cache.replace(key=np.zeros((1, 2, 2, 48, 24)))
  assert not kept.fits(wide, Full())


@pytest.mark.parametrize("implementation", ["cudnn", "flash"])
def test_lowered_for_a_gpu_no_layer_of_the_cache_is_copied(implementation):
  shape = jax.ShapeDtypeStruct
  ids = shape((2, 1024), jnp.int32)
  key = shape((LAYERS, 2, GROUPS, 1024, 64), jnp.bfloat16)
  cache = KVCache(key=key, value=key, segment_ids=ids)
  q = shape((2, 32, 4, 64), jnp.bfloat16)
  mine = shape((2, 32), jnp.int32)

  def run(q, cache, mine, ids, layer):
    return cached_attention(
      q, cache, layer, mask=Full(), q_segments=mine, k_segments=ids,
      q_slots=mine, implementation=implementation,
    )  # fmt: skip

  arrays = q, cache, mine, ids, shape((), jnp.int32)
  with jax.sharding.use_abstract_mesh(an_h100()):
    traced = jax.jit(run).trace(*arrays)
    assert kept.NAME in traced.lower(lowering_platforms=("cuda",)).as_text()
  # Nothing as large as a layer but the cache, which only the kernel is given.
  found = larger_than(traced.jaxpr, 2 * GROUPS * 1024 * 64)
  assert {name for name, _ in found} == {"shard_map", "pallas_call"}

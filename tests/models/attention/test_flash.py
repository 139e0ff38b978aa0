"""The kernels of tiles, step by step without a GPU, against the reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.mask import BlockCausal, Causal, Full, TwoStream
from dllm_jax.models.attention import attention, flash
from dllm_jax.parallel import make_mesh
from tests.jaxprs import larger_than
from tests.quick import long

LENGTH, HEADS, GROUPS, WIDTH = 256, 2, 1, 16


def draw(length=LENGTH, width=WIDTH):
  rng = np.random.default_rng(0)
  shapes = [(2, length, n, width) for n in (HEADS, GROUPS, GROUPS)]
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def segments(length=LENGTH):
  """Returns two documents and padding in row 0, in both streams, one in row 1."""
  at = np.arange(length) % (length // 2)
  row = np.where(at < 50, 1, np.where(at < 110, 2, 0))
  return np.stack([row, np.ones_like(row)]).astype(np.int32)


def an_h100():
  device = jax.sharding.AbstractDevice("NVIDIA H100", 132, "gpu")
  return jax.sharding.AbstractMesh(
    (1,), ("one",), (jax.sharding.AxisType.Auto,), abstract_device=device
  )


def total(run, spec, parts):
  def of(q, k, v):
    out = run(q, k, v, spec, parts, parts)
    # Padded queries mean nothing.
    out = jnp.where((parts > 0)[:, :, None, None], out, 0)
    return jnp.sum(jnp.sin(3 * out)), out

  return jax.value_and_grad(of, (0, 1, 2), has_aux=True)


def reference(q, k, v, spec, a, b):
  return attention(q, k, v, mask=spec, q_segments=a, k_segments=b)


def agree(found, expected):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * np.abs(b).max()),
    *jax.device_get((found, expected)),
  )


@pytest.mark.parametrize("spec, length", [
    (TwoStream(128, 16), LENGTH),
    long(Full(), 200),  # padded to whole tiles
    long(Causal(), LENGTH),
    long(BlockCausal(32), LENGTH),
], ids=str)  # fmt: skip
def test_kernels_equal_the_reference_gradients_included(spec, length):
  parts = segments(length)
  kernel = functools.partial(flash.attention, interpret=True)
  both = jax.jit(
    lambda *qkv: tuple(total(f, spec, parts)(*qkv) for f in (kernel, reference))
  )
  agree(*both(*draw(length, width=12)))


@pytest.mark.all
def test_kernels_over_divided_positions():
  spec, parts, length = TwoStream(256, 32), segments(512), 512
  expected = jax.jit(total(reference, spec, parts))(*draw(length))
  kernel = functools.partial(flash.attention, interpret=True)
  mesh = make_mesh({"data": 1, "context": 2}, jax.devices()[:2])
  with jax.set_mesh(mesh):
    found = jax.jit(total(kernel, spec, parts))(*draw(length))
  agree(found, expected)


@pytest.mark.all
def test_tiles_that_are_empty_are_not_in_the_lists():
  spec = TwoStream(512, 32)
  options = flash._Options(spec, 1024, True)
  first = jnp.zeros((), jnp.int32)
  row = np.where(np.arange(1024) % 512 < 256, 1, 0)
  parts = np.stack([np.ones_like(row), row]).astype(np.int32)
  lists = functools.partial(flash._lists, options, (128, 64))
  kinds = jax.jit(lists)(parts, parts, first)
  for found, part in zip(kinds, parts, strict=True):
    slots = np.arange(1024)
    allowed = spec.allowed(slots[:, None], slots[None])
    # Padding sees padding; nothing else sees it.
    allowed &= part[:, None] == part[None]
    tiles = allowed.reshape(8, 128, 16, 64)
    np.testing.assert_array_equal(found > 0, tiles.any((1, 3)))
    np.testing.assert_array_equal(found > 1, tiles.all((1, 3)))
  ends, order = jax.jit(flash._walk)(kinds)
  for row, found in enumerate(kinds[0]):
    walked = np.asarray(order[0, row, : ends[0, row, 1]])
    assert set(walked) == set(np.flatnonzero(found))
    assert (found[walked[: ends[0, row, 0]]] == 2).all()


def test_lowered_for_a_gpu_no_array_has_the_size_of_the_scores():
  length, spec = 1024, TwoStream(512, 32)
  parts = np.ones((2, length), np.int32)

  def loss(*qkv):
    return jnp.sum(flash.here(spec, *qkv, parts, parts).astype(jnp.float32))

  qkv = [jnp.asarray(x, jnp.bfloat16) for x in draw(length, 64)]
  # jax 0.12 wants to know which GPU, where none is here.
  with jax.sharding.use_abstract_mesh(an_h100()):
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*qkv)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert not larger_than(traced.jaxpr, length * length)
  names = ("flash_forward", "flash_backward_dq", "flash_backward_dkv")
  assert text.count("__gpu$xla.gpu.triton") == len(names)
  assert all(name in text for name in names)

"""Attention over divided positions against the same attention in one piece."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.mask import BlockCausal, Causal, Full, TwoStream
from dllm_jax.models.attention import attention, context
from dllm_jax.parallel import make_mesh
from tests.quick import long

BATCH, LENGTH, HEADS, GROUPS, WIDTH = 2, 16, 4, 2, 4
MASKS = [Full(), Causal(), BlockCausal(3), TwoStream(8, 2), TwoStream(8, 8)]
MESHES = {
  "context4": {"data": 2, "context": 4},
  "context2_tensor2": {"data": 2, "tensor": 2, "context": 2},
}
# One document, and two with padding: the same in both streams.
SEGMENTS = np.array([[1] * LENGTH, [1, 1, 1, 2, 2, 2, 0, 0] * 2])
# Compiled fast: what is tested is arithmetic, not speed.
QUICK = {"xla_backend_optimization_level": 0}


def draw(key=0):
  rng = np.random.default_rng(key)
  shapes = [(BATCH, LENGTH, n, WIDTH) for n in (HEADS, GROUPS, GROUPS, HEADS)]
  return [2 * rng.normal(size=shape).astype(np.float32) for shape in shapes]


def outcome(strategy, segments=SEGMENTS):
  """Returns (q, k, v, d) -> outputs and gradients, of every mask at once."""

  def run(q, k, v, d):
    def of(mask):
      def total(q, k, v):
        out = attention(
            q, k, v, mask=mask, q_segments=segments, k_segments=segments,
            context=strategy,
        )  # fmt: skip
        out = jnp.where((segments > 0)[..., None, None], out, 0)
        return jnp.sum(out * d), out

      return jax.grad(total, (0, 1, 2), has_aux=True)(q, k, v)

    return {str(mask): of(mask) for mask in MASKS}

  return run


@pytest.fixture(scope="module")
def alone():
  return jax.device_get(
    jax.jit(outcome("all_gather"), compiler_options=QUICK)(*draw())
  )


def assert_near(there, alone):
  # Relative to each array's largest entry: float32 sums in another order.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6 * np.abs(b).max()),
    there,
    alone,
  )


@pytest.mark.all
@pytest.mark.parametrize("strategy", context.STRATEGIES)
@pytest.mark.parametrize(
  "mesh, piece",
  [
    ("context4", 2),
    long("context4", 1024),
    long("context2_tensor2", 1024),
  ],
)
def test_every_mask_equals_the_plain_path(
  monkeypatch, alone, strategy, mesh, piece
):
  monkeypatch.setattr(context, "_PIECE", piece)
  with jax.set_mesh(make_mesh(MESHES[mesh])):
    run = jax.jit(outcome(strategy), compiler_options=QUICK)
    assert_near(jax.device_get(run(*draw())), alone)


def compiled(strategy, length=512):
  """Returns the compiled gradient of one row's attention on 8 devices."""
  segments = jnp.ones((1, length), jnp.int32)
  shape = jax.ShapeDtypeStruct((1, length, 1, 8), jnp.float32)

  def total(q, k, v):
    return attention(
        q, k, v, mask=Full(), q_segments=segments, k_segments=segments,
        context=strategy,
    ).sum()  # fmt: skip

  mesh = make_mesh({"context": 8})
  with jax.set_mesh(mesh):
    here = jax.NamedSharding(mesh, jax.P(None, "context"))
    program = jax.jit(
      jax.grad(total, (0, 1, 2)),
      in_shardings=(here,) * 3,
      out_shardings=(here,) * 3,
      compiler_options=QUICK,
    )
    return program.lower(shape, shape, shape).compile()


def collectives(program):
  """Returns how often each collective stands in a compiled program."""
  names = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute",
           "all-to-all")  # fmt: skip
  text = program.as_text()
  return {n: len(re.findall(rf" {n}(-start)?\(", text)) for n in names}


@pytest.mark.all
def test_memory_and_collectives(monkeypatch):
  """The compiler alone keeps all scores; the ring never gathers."""
  monkeypatch.setattr(context, "_PIECE", 32)
  gather, ring = compiled("all_gather"), compiled("ring")
  monkeypatch.setattr(context, "divides", lambda length: False)
  plain = compiled("all_gather")
  # Keys and values are gathered in both passes, their gradients scattered.
  assert collectives(gather) == {
      "all-gather": 2, "all-reduce": 0, "reduce-scatter": 2,
      "collective-permute": 0, "all-to-all": 0,
  }  # fmt: skip
  alone = collectives(ring)
  assert alone.pop("collective-permute") and not any(alone.values())
  assert sum(collectives(plain).values()) > 4
  size = lambda program: program.memory_analysis().temp_size_in_bytes
  print(collectives(plain), size(plain), size(gather), size(ring))
  assert size(ring) < 0.7 * size(gather) < 0.7 * 0.5 * size(plain)

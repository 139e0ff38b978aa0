"""Stochastic rounding: one of the two neighbours, right on average."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.rounding import stochastic, stochastic_tree, widened
from dllm_jax.parallel import make_mesh


@pytest.mark.parametrize(
  "x", [1.0 + 2**-10, -3.0 - 2**-9, 1e-30, 1.0 + 2**-8 * 0.9, 0.1]
)
def test_the_mean_is_the_number(x):
  count = 40_000
  rounded = np.asarray(
    stochastic(jax.random.key(0), jnp.full((count,), x, jnp.float32)),
    np.float64,
  )
  low, high = np.unique(rounded)
  gap = high - low
  assert low < np.float32(x) < high
  p = (np.float64(np.float32(x)) - low) / gap
  error = gap * np.sqrt(p * (1 - p) / count)
  assert abs(rounded.mean() - np.float32(x)) < 4 * error


def test_what_bfloat16_has_stays():
  exact = np.asarray(
    [0.0, -0.0, 1.0, -2.5, 1e30, np.inf, -np.inf], jnp.bfloat16
  )
  given = jnp.asarray(exact, jnp.float32)
  np.testing.assert_array_equal(stochastic(jax.random.key(1), given), exact)
  assert np.isnan(stochastic(jax.random.key(1), jnp.float32(np.nan)))


@pytest.mark.parametrize("axes", [{"fsdp": 4}, {"data": 2, "tensor": 4}])
def test_a_mesh_changes_nothing(axes):
  """Each number is rounded alike wherever it lies."""
  x = jnp.linspace(-2.0, 2.0, 16 * 24).reshape(16, 24)
  like = {"w": x.astype(jnp.bfloat16)}
  one = stochastic_tree(jax.random.key(3), {"w": x}, like)["w"]
  sizes = {"data": 1} | axes
  count = math.prod(sizes.values())
  mesh = make_mesh(sizes, jax.devices()[:count])
  where = jax.sharding.NamedSharding(mesh, jax.P(*[a for a in axes][:2]))
  program = jax.jit(stochastic_tree, out_shardings={"w": where})
  placed = jax.device_put(x, where)
  many = program(jax.random.key(3), {"w": placed}, like)["w"]
  assert len(many.sharding.device_set) == count
  np.testing.assert_array_equal(one, many)
  other = stochastic_tree(jax.random.key(4), {"w": x}, like)["w"]
  assert (other != one).any()


def test_trees_keep_their_types_and_draw_apart():
  x = jnp.full((64,), 1.0 + 2**-9)
  like = {"a": x.astype(jnp.bfloat16), "b": x, "c": x.astype(jnp.bfloat16)}
  found = stochastic_tree(jax.random.key(0), dict.fromkeys("abc", x), like)
  assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(
    lambda x: x.dtype, like
  )
  assert (found["a"] != found["c"]).any() and (found["b"] == x).all()
  assert jax.tree.leaves(widened(found))[0].dtype == jnp.float32

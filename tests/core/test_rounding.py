"""Stochastic rounding: one of the two neighbours, right on average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.rounding import stochastic, stochastic_tree, widened


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


def test_trees_keep_their_types_and_draw_apart():
  x = jnp.full((64,), 1.0 + 2**-9)
  like = {"a": x.astype(jnp.bfloat16), "b": x, "c": x.astype(jnp.bfloat16)}
  found = stochastic_tree(jax.random.key(0), dict.fromkeys("abc", x), like)
  assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(
    lambda x: x.dtype, like
  )
  assert (found["a"] != found["c"]).any() and (found["b"] == x).all()
  assert jax.tree.leaves(widened(found))[0].dtype == jnp.float32

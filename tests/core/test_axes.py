"""Reductions along an axis, as its platform needs them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.axes import folded


@pytest.mark.parametrize("size", [1, 2, 3, 17, 31, 32, 33, 100])
def test_each_number_of_a_row_is_looked_at(size):
  x = jnp.eye(size)
  np.testing.assert_array_equal(folded(jnp.maximum, x), 1.0)
  np.testing.assert_array_equal(folded(jnp.minimum, -x), -1.0)


def test_types_infinities_and_nan():
  assert folded(jnp.minimum, jnp.arange(40)) == 0
  some = jnp.full((2, 40), -jnp.inf).at[1, 38].set(jnp.nan)
  np.testing.assert_array_equal(folded(jnp.maximum, some), [-jnp.inf, jnp.nan])


def test_no_row_is_reduced_number_by_number_on_cpus():
  x = jnp.zeros((4, 1600))
  text = jax.jit(lambda x: folded(jnp.maximum, x)).lower(x).as_text()
  reduced = [line for line in text.splitlines() if "stablehlo.reduce(" in line]
  assert len(reduced) == 1 and "tensor<4x100xf32>" in reduced[0]

"""Reductions along an axis and products, as their platform needs them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.axes import folded, of_rows, product_with_table
from dllm_jax.parallel import compilation, make_mesh


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


def _normal(seed, *shape, dtype="float32"):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 1), (4,), (2, 3), (2, 70)])
def test_a_product_with_a_table_and_its_gradients(shape, dtype):
  x, table = _normal(0, *shape, 32), _normal(1, 500, 32)
  x, table = x.astype(dtype), table.astype(dtype)
  wide = lambda x, table: x.astype("float32") @ table.astype("float32").T
  found, pull = jax.vjp(product_with_table, x, table)
  expected, pulled = jax.vjp(wide, x, table)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
  g = _normal(2, *found.shape)
  for one, other in zip(pull(g), pulled(g), strict=True):
    assert one.dtype == dtype
    one, other = one.astype("float32"), other.astype("float32")
    rounding = 1e-5 if dtype == "float32" else 2**-7
    np.testing.assert_allclose(one, other, rtol=rounding, atol=1e-4)


def test_a_table_is_divided_as_the_mesh_divides_it():
  """A layout that is asked for would make it whole on each device."""
  mesh = make_mesh({"tensor": 8})
  x, table = _normal(0, 4, 32), _normal(1, 512, 32)
  with jax.set_mesh(mesh):
    place = lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))
    there = jax.device_put(table, place("tensor"))
    program = compilation.jit(product_with_table, mesh=mesh)
    found = program(x, there)
    assert "all-gather" not in program.lower(x, there).compile().as_text()
  np.testing.assert_allclose(found, x @ table.T, rtol=1e-5, atol=1e-5)


def test_a_table_is_the_first_factor_and_not_copied_for_a_loop():
  table, x = _normal(0, 8000, 32), _normal(1, 3, 4, 32)
  logits = lambda table: lambda x: jnp.max(product_with_table(x, table), -1)
  loop = lambda x, table: jax.lax.map(logits(table), x)
  program = compilation.jit(loop).lower(x, table).compile()
  dots = [y for y in program.as_text().splitlines() if " dot(" in y]
  assert len(dots) == 1 and "f32[8000,4]" in dots[0]
  assert program.memory_analysis().temp_size_in_bytes < table.nbytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1), (3,)])
def test_rows_are_what_they_are_alone(shape, dtype):
  x, w = _normal(0, *shape, 16, dtype=dtype), _normal(1, 16, 24, dtype=dtype)
  product = lambda x, w: of_rows(lambda x: x @ w, x)
  found, pull = jax.vjp(product, x, w)
  expected, pulled = jax.vjp(lambda x, w: x @ w, x, w)
  np.testing.assert_array_equal(found, expected)
  for one, other in zip(pull(found), pulled(found), strict=True):
    np.testing.assert_array_equal(one, other)


def test_a_matrix_of_half_the_bits_is_not_widened_for_one_row():
  x, w = (_normal(0, *s, dtype="bfloat16") for s in ((1, 512), (512, 4096)))
  wide = {"preferred_element_type": jnp.float32}
  run = lambda x, w: of_rows(lambda x: jnp.matmul(x, w, **wide), x)
  program = compilation.jit(run, dtype="bfloat16").lower(x, w).compile()
  assert program.memory_analysis().temp_size_in_bytes < w.nbytes

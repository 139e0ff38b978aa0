"""The forms of products and of rotation in which CPUs are quick.

Equal numbers come of other forms too, so that only a clock would miss these.
"""

import jax
import jax.numpy as jnp

from dllm_jax.models import rotary
from dllm_jax.models.layers import Linear
from dllm_jax.parallel import make_mesh
from tests import jaxprs

X = jax.ShapeDtypeStruct((2, 5, 3, 8), jnp.float32)


def products(linear, x):
  """Returns the ranks of both factors of each product in a gradient."""

  def total(params, x):
    return linear.apply(params, x).sum()

  params = jax.eval_shape(linear.init, jax.random.key(0), x)
  traced = jax.make_jaxpr(jax.grad(total, (0, 1)))(params, x)
  return [
    tuple(len(factor.aval.shape) for factor in equation.invars)
    for equation in jaxprs.equations(traced)
    if equation.primitive.name == "dot_general"
  ]


def test_positions_are_one_axis_of_a_cpus_products():
  """XLA's CPU compiler copies factors of a gradient whose sum has two axes."""
  linears = (
    Linear((8,), (4,)),
    Linear((3, 8), (4,)),
    Linear((8,), (3, 4), bias=True),
  )
  for linear in linears:
    x = jax.ShapeDtypeStruct((2, 5, *linear.inputs), jnp.float32)
    # The product itself, and the gradients of both of its factors.
    assert products(linear, x) == [(2, 2)] * 3
  with jax.set_mesh(make_mesh({"data": 2}, jax.devices()[:2])):
    # One axis would mix rows with positions, which a mesh divides apart.
    x = jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)
    assert (2, 2) not in products(linears[0], x)


def test_a_cpu_turns_heads_without_joining_halves():
  """A loop that reads one of two joined halves branches at every feature."""
  table = jax.ShapeDtypeStruct((2, 5, 1, 4), jnp.float32)

  def joined(turn):
    traced = jax.make_jaxpr(turn)(X, table, table)
    return [n for n, shape in jaxprs.values(traced) if shape == X.shape]

  found = joined(lambda x, *tables: rotary.rotate(x, tables))
  assert found and "concatenate" not in found
  assert "concatenate" in joined(rotary._by_halves)

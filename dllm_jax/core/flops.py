"""Counting the FLOPs of matrix products in a traced program, exactly.

XLA's own cost analysis counts the body of a loop once; here a scan counts as often
as it runs. A product of [m, k] and [k, n] counts 2 m k n; elementwise work does
not count.
"""

from collections.abc import Callable
import math

import jax
from jax.extend import core


def matmul_flops(fn: Callable, *args) -> int:
  """Returns the FLOPs of the matrix products in `fn(*args)`.

  Args:
    fn: a function of arrays or of shapes and types.
    *args: its arguments; only shapes and types are used.

  Raises:
    ValueError: it has a loop whose number of rounds is not known beforehand.
  """
  return _count(jax.make_jaxpr(fn)(*args).jaxpr)


def any_device():
  """Returns a scope in which programs have no forms that are for CPUs alone."""
  device = jax.sharding.AbstractDevice("any", None, "any")
  kind = (jax.sharding.AxisType.Auto,)
  return jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh((1,), ("one",), kind, abstract_device=device)
  )


def _count(jaxpr: core.Jaxpr) -> int:
  return sum(_equation(eqn) for eqn in jaxpr.eqns)


def _equation(eqn: core.JaxprEqn) -> int:
  name = eqn.primitive.name
  if name == "dot_general":
    (contract, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    inner = math.prod(left[i] for i in contract)
    return 2 * inner * math.prod(eqn.outvars[0].aval.shape)
  if name == "ragged_dot_general":  # each row meets the matrix of its group
    dims = eqn.params["ragged_dot_dimension_numbers"]
    (contract, _), _ = dims.dot_dimension_numbers
    left = eqn.invars[0].aval.shape
    inner = math.prod(left[i] for i in contract)
    if set(dims.lhs_ragged_dimensions) <= set(contract):
      inner //= eqn.outvars[0].aval.shape[0]
    return 2 * inner * math.prod(eqn.outvars[0].aval.shape)
  inside = [
    _count(sub.jaxpr if isinstance(sub, core.ClosedJaxpr) else sub)
    for value in eqn.params.values()
    for sub in (value if isinstance(value, (tuple, list)) else (value,))
    if isinstance(sub, (core.Jaxpr, core.ClosedJaxpr))
  ]
  if name == "shard_map":  # what one device does, by all that do it
    sizes = eqn.params["mesh"].shape
    return sum(inside) * math.prod(
      sizes[a] for a in eqn.params["newly_manual_axes"]
    )
  if name == "cond":
    return max(inside, default=0)
  if name == "while" and sum(inside):
    raise ValueError("a while loop's matrix products cannot be counted")
  return sum(inside) * eqn.params.get("length", 1 if name != "scan" else 0)

"""What a traced program holds: walks scan bodies and branches too."""

from collections.abc import Iterator

import jax
import jax.extend.core


def equations(jaxpr: jax.extend.core.Jaxpr) -> Iterator:
  """Yields every equation of a jaxpr and of the jaxprs inside it."""
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      yield from _inside(value)


def _inside(value) -> Iterator:
  if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
    yield from equations(value)
  elif isinstance(value, (tuple, list)):
    for item in value:
      yield from _inside(item)


def values(jaxpr: jax.extend.core.Jaxpr) -> Iterator[tuple[str, tuple]]:
  """Yields (primitive name, shape) of every intermediate value."""
  for equation in equations(jaxpr):
    for variable in (*equation.invars, *equation.outvars):
      shape = getattr(variable.aval, "shape", None)
      if shape is not None:
        yield equation.primitive.name, tuple(shape)


def larger_than(
  jaxpr: jax.extend.core.Jaxpr, elements: int
) -> list[tuple[str, tuple]]:
  """Returns the values that have `elements` elements or more."""
  found = []
  for name, shape in values(jaxpr):
    size = 1
    for axis in shape:
      size *= axis
    if size >= elements and (name, shape) not in found:
      found.append((name, shape))
  return found


def to_the_host(jaxpr: jax.extend.core.Jaxpr) -> set[str]:
  """Returns the names of primitives that call back to Python, prints too."""
  names = primitives(jaxpr)
  return {n for n in names if "callback" in n or n.startswith("debug")}


def primitives(jaxpr: jax.extend.core.Jaxpr) -> set[str]:
  """Returns the names of all primitives."""
  return {equation.primitive.name for equation in equations(jaxpr)}

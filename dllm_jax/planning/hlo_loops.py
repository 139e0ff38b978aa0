"""How often the loops of an optimised program run, where its text says so."""

from collections.abc import Mapping
import re

from dllm_jax.planning.hlo_text import Op, place_of, source


def trips(
  computations: Mapping[str, dict[str, Op]], computation: str, loop: Op
) -> int | None:
  """Returns how often a loop runs at most; None where nothing tells.

  The compiler has noted it, or the condition is i < n with n a constant, or the
  loop goes on while a value is true that its body makes false: a condition
  without an array for each side, of one round.

  Args:
    computations: all of the program's, by name.
    computation: the one that the loop is in.
    loop: the loop.
  """
  noted = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
  if noted:
    return int(noted[1])
  called = lambda what: computations[
    re.search(what + r"=%?([\w.\-~]+)", loop.rest)[1]
  ]
  condition, body = called("condition"), called("body")
  test = _root(condition)
  flag = place_of(test)
  if flag is not None:
    return 1 if _is_false(body, flag) else None
  if test.code != "compare" or "direction=LT" not in test.rest:
    return None
  counter, limit = (source(condition, name) for name in test.operands)
  place = place_of(counter)
  if place is None:
    return None
  outer = computations[computation]
  first = source(outer, loop.operands[0])

  def value(op):
    at = place_of(op)
    if at is not None and first is not None and first.code == "tuple":
      op = source(outer, first.operands[at])
    return int(op.rest) if op is not None and op.code == "constant" else None

  start, end = value(counter) or 0, value(limit)
  return None if end is None else -(-(end - start) // _stride(body, place))


def _root(ops: Mapping[str, Op]) -> Op:
  return next(op for op in ops.values() if op.root)


def _made(body: dict[str, Op], place: int) -> Op | None:
  """Returns what makes an element of the carry in a loop's body."""
  root = _root(body)
  return source(body, root.operands[place]) if root.code == "tuple" else None


def _is_false(body: dict[str, Op], place: int) -> bool:
  op = _made(body, place)
  return op is not None and op.code == "constant" and op.rest == "false"


def _stride(body: dict[str, Op], place: int) -> int:
  """Returns what a loop adds to its counter in a round; unrolled ones, several."""
  total, op = 0, _made(body, place)
  while op is not None and op.code == "add":
    sides = [source(body, name) for name in op.operands]
    known = [side for side in sides if side and side.code == "constant"]
    if len(known) != 1:
      break
    total += int(known[0].rest)
    op = next(side for side in sides if side is not known[0])
  return max(total, 1)

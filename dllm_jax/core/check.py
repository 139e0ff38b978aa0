"""Checks of numbers that a caller gives: one message for each kind of bound.

Of names: what a wrong one is close to.
"""

from collections.abc import Iterable
import difflib
from typing import Any


def close(name: str, legal: Iterable[str]) -> str:
  """Returns "did you mean ...? " where a legal name is close, else ""."""
  found = difflib.get_close_matches(name, [*legal], n=1)
  return f"did you mean {found[0]!r}? " if found else ""


def at_least(owner: Any, low: float, *names: str, prefix: str = "") -> None:
  """Checks that the named fields reach `low`; those that are None are left out.

  Args:
    owner: what has the fields.
    low: the smallest legal value.
    *names: the fields.
    prefix: what stands before their names in the message.

  Raises:
    ValueError: one does not.
  """
  for name in names:
    value = getattr(owner, name)
    if value is not None and value < low:
      raise ValueError(f"{prefix}{name} must be at least {low}, not {value}")


def within(name: str, value: float, interval: str) -> None:
  """Checks that a value lies in an interval such as "[0, 1)".

  Raises:
    ValueError: it does not.
  """
  low, high = map(float, interval[1:-1].split(","))
  inside = low < value < high
  inside |= value == low and interval[0] == "["
  inside |= value == high and interval[-1] == "]"
  if not inside:
    raise ValueError(f"{name} must lie in {interval}, not {value}")

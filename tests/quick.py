"""What of many parameters the quick tests take; the rest is marked `all`."""

from collections.abc import Callable, Hashable, Sequence

import pytest


def long(*values, **options):
  """Returns a parameter of `make test-all` only."""
  return pytest.param(*values, marks=pytest.mark.all, **options)


def few(cases: Sequence, features: Callable[[Hashable], set]) -> list:
  """Returns cases as parameters; those that show nothing new are long.

  Args:
    cases: what tells the parameters apart, hashable.
    features: returns the set of what a case shows.
  """
  left, kept = set().union(*map(features, cases)), set()
  while left:
    most = max(cases, key=lambda case: len(features(case) & left))
    kept.add(most)
    left -= features(most)
  each = lambda case: pytest.param if case in kept else long
  return [each(case)(case) for case in cases]

"""Parameters that train and those that do not, apart and together.

What trains is what has gradients, an average, an optimiser's state and a place in
checkpoints; the rest stays what it was. Trees are nested dicts; whatever is no
dict counts as one parameter, such as a matrix that is held in few bits.
"""

from typing import Any

from jaxtyping import PyTree


def is_leaf(value: Any) -> bool:
  """Returns whether something is one parameter, not a dict of several."""
  return not isinstance(value, dict)


def split(params: PyTree, trains: PyTree | None) -> tuple[PyTree, PyTree]:
  """Returns what trains, and the rest, as trees of the same paths.

  Args:
    params: parameters.
    trains: True at those that train; None if all do.
  """
  if trains is None:
    return params, {}
  trained, frozen = {}, {}
  for name, value in params.items():
    if is_leaf(value):
      (trained if trains[name] else frozen)[name] = value
      continue
    own, rest = split(value, trains[name])
    if own:
      trained[name] = own
    if rest or not own:  # an empty dict belongs to what is frozen
      frozen[name] = rest
  return trained, frozen


def join(trained: PyTree, frozen: PyTree) -> PyTree:
  """Returns both in one tree; where both have a parameter, the one that trains.

  `join(*split(params, trains))` are the parameters.
  """
  if is_leaf(trained) or is_leaf(frozen):
    return trained
  both = {
    name: join(trained[name], frozen[name]) if name in trained else frozen[name]
    for name in frozen
  }
  return both | {k: v for k, v in trained.items() if k not in frozen}

"""Which rewards there are: functions here, and entry points.

A reward is said as `name=weight`, several with commas between, a name with an
argument in brackets: `countdown=1,length[64]=0.1`. A package of your own adds one
by an entry point of the group `dllm_jax.rewards`, whose object is a function
`(prompt, completion, row) -> float`; with a keyword `argument` if it takes one.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import importlib
import importlib.metadata
import math
import re

_HERE = "dllm_jax.posttraining.reinforcement.rewards.verifiers"
_NAMES = (
  "code", "countdown", "countdown_steps", "format", "length", "number", "regex",
  "sudoku", "sudoku_cells"
)  # fmt: skip
JUDGE = "judge"
"""The log-likelihood under another model, which needs its network."""

_TERM = re.compile(
  r"(?P<name>\w+)(?:\[(?P<argument>.*?)\](?=[=,]|$))?"
  r"(?:=(?P<weight>[-+\d.e]+))?(?:,|$)"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Term:
  """A reward with its weight.

  Attributes:
    name: of the function.
    argument: what it is told, or "".
    weight: factor in the sum.
  """

  name: str
  argument: str = ""
  weight: float = 1.0

  @property
  def label(self) -> str:
    """What it is called in logs."""
    return f"{self.name}[{self.argument}]" if self.argument else self.name


def known() -> dict[str, str]:
  """Returns where rewards are found, `module:function` by name."""
  found = {name: f"{_HERE}:{name}" for name in _NAMES}
  for entry in importlib.metadata.entry_points(group="dllm_jax.rewards"):
    found.setdefault(entry.name, entry.value)
  return found | {JUDGE: ""}


def parse(text: str) -> tuple[Term, ...]:
  """Returns the rewards that a text names.

  Raises:
    ValueError: it is not of that form, or names one that does not exist.
  """
  found, at = [], 0
  for match in _TERM.finditer(text):
    if match.start() != at or match.end() == match.start():
      break
    at = match.end()
    found.append(
      Term(
        name=match["name"],
        argument=match["argument"] or "",
        weight=float(match["weight"] or 1.0),
      )
    )
  if not found or at != len(text):
    raise ValueError(
      "reinforce.rewards is name=weight with commas between, for example"
      f" countdown=1,length[64]=0.1, not {text!r}"
    )
  legal = known()
  for term in found:
    if term.name not in legal:
      raise ValueError(
        f"there is no reward {term.name!r}; legal: {', '.join(sorted(legal))},"
        " and entry points of the group dllm_jax.rewards"
      )
    if term.name != JUDGE:
      _check(term)
  return tuple(found)


def _check(term: Term) -> None:
  """Checks that a reward can be called.

  Raises:
    ValueError: its module is not there, or its argument is illegal.
  """
  try:
    function(term.name)
  except (ImportError, AttributeError) as error:
    raise ValueError(
      f"the reward {term.name!r} is {known()[term.name]}, which cannot be"
      f" imported ({error}): install what it needs"
    ) from error
  if term.name in ("format", "regex") and term.argument:
    try:
      re.compile(term.argument)
    except re.error as error:
      raise ValueError(
        f"{term.label} is no regular expression ({error})"
      ) from error
  if term.name == "regex" and not term.argument:
    raise ValueError("the reward regex needs an expression: regex[...]=weight")


@functools.cache
def function(name: str) -> Callable[..., float]:
  """Returns a reward's function."""
  module, _, attribute = known()[name].partition(":")
  return getattr(importlib.import_module(module), attribute)


def is_quick(term: Term) -> bool:
  """Returns whether a reward is one of ours that takes no time to speak of."""
  return term.name in _NAMES and term.name != "code"


def tried(
  term: Term, asked: Sequence[tuple[str, str, dict]]
) -> list[tuple[float | None, str]]:
  """Returns what answers earn by one reward, or what went wrong.

  Args:
    term: the reward.
    asked: (prompt, completion, row) of each.
  """
  found = []
  for one in asked:
    try:
      value = call(term, *one)
    except Exception as error:  # pylint: disable=broad-except
      # Whatever a function raises is a failure of its sample.
      found.append((None, type(error).__name__))
      continue
    finite = math.isfinite(value)
    found.append((value, "") if finite else (None, "not finite"))
  return found


def call(term: Term, prompt: str, completion: str, row: dict) -> float:
  """Returns what an answer earns by one reward."""
  told = {"argument": term.argument} if term.argument else {}
  return float(function(term.name)(prompt, completion, row, **told))

"""Rewards in processes of their own, while the next rollouts are sampled.

A function that raises, hangs beyond its time or returns no finite number is a
failure of that sample: it earns 0 there and is counted. A process that hangs is
killed and replaced (Pebble).
"""

from collections.abc import Mapping, Sequence
from concurrent import futures
import contextlib
import math
import multiprocessing
import os
from typing import Any, NamedTuple

from dllm_jax.posttraining.reinforcement.rewards import registry
from dllm_jax.posttraining.reinforcement.rewards.registry import Term

_START_SECONDS = 60.0  # a process imports what rewards need before the first


class Earned(NamedTuple):
  """What an answer earned.

  Attributes:
    total: the weighted sum.
    parts: by reward; None where it failed.
    failures: what went wrong, by reward.
  """

  total: float
  parts: dict[str, float | None]
  failures: dict[str, str]


class Asked(NamedTuple):
  """An answer whose rewards are under way."""

  prompt: str
  completion: str
  row: Mapping[str, Any]


class Rewards:
  """Rewards of answers, computed in parallel.

  Args:
    terms: the rewards.
    seconds: time that one has for an answer.
    processes: how many; 0 for as many as there are cores.
    judge: `(prompts, completions, path) -> values` of a judge, if there is one.
  """

  def __init__(
    self,
    terms: Sequence[Term],
    *,
    seconds: float = 10.0,
    processes: int = 0,
    judge: Any = None,
  ):
    self.terms, self._judge = tuple(terms), judge
    self._seconds, self._count = seconds, processes or os.cpu_count() or 1
    self._pool = None

  def __enter__(self) -> "Rewards":
    self._start()
    return self

  def _start(self) -> None:
    """Starts processes, for the first time or after all are gone."""
    import pebble  # noqa: PLC0415

    # Not forked: jax has threads. A server forks, which imports no jax.
    self._pool = pebble.ProcessPool(
      max_workers=self._count,
      context=multiprocessing.get_context("forkserver"),
    )
    # Started before anything waits for it.
    self._first = [
      self._pool.schedule(_ready, timeout=_START_SECONDS)
      for _ in range(self._count)
    ]

  def __exit__(self, *exc: Any) -> None:
    self._pool.stop()
    self._pool.join()

  def ask(self, asked: Sequence[Asked]) -> "Pending":
    """Begins to compute the rewards of answers."""
    for future in self._first:
      with contextlib.suppress(Exception):
        future.result()
    self._first = []
    told = [(one.prompt, one.completion, dict(one.row)) for one in asked]
    begun = {
      term.label: [
        self._begun(term, told[start : start + self._size(term, len(told))])
        for start in range(0, len(told), self._size(term, len(told)))
      ]
      for term in self.terms
      if term.name != registry.JUDGE
    }
    return Pending(self, list(asked), begun)

  def _size(self, term: Term, count: int) -> int:
    """Returns how many answers are one task: to hand over has a price."""
    return -(-count // self._count) if registry.is_quick(term) else 1

  def _begun(self, term: Term, told: Sequence[tuple]) -> "_Task":
    ask = {"args": (term, told), "timeout": self._seconds}
    try:
      future = self._pool.schedule(registry.tried, **ask)
    except RuntimeError:  # no process is left, for want of memory perhaps
      self._start()
      future = self._pool.schedule(registry.tried, **ask)
    return _Task(term, list(told), future)

  def finished(
    self, task: "_Task", tries: int = 2
  ) -> list[tuple[float | None, str]]:
    """Returns what came of a task; of one that hangs, answer by answer.

    Args:
      task: the task.
      tries: how often an answer is asked again whose process has died.
    """
    try:
      return task.future.result()
    except Exception as error:  # pylint: disable=broad-except
      # A process that is gone, however that came, is no reason to stop.
      late = isinstance(error, futures.TimeoutError)
      if len(task.told) == 1 and (late or not tries):
        return [(None, "timeout" if late else type(error).__name__)]
    single = [self._begun(task.term, [one]) for one in task.told]
    return [found for one in single for found in self.finished(one, tries - 1)]

  def judged(self, asked: Sequence[Asked]) -> dict[str, list[float]]:
    """Returns what judges say of answers, by reward: nats per token."""
    found = {}
    for term in self.terms:
      if term.name == registry.JUDGE:
        found[term.label] = self._judge(asked, term.argument)
    return found


class _Task(NamedTuple):
  """Some answers that a process was given."""

  term: Term
  told: list[tuple]
  future: futures.Future


class Pending(NamedTuple):
  """Rewards that are under way."""

  rewards: Rewards
  asked: list[Asked]
  begun: dict[str, list[_Task]]

  def wait(self) -> list[Earned]:
    """Returns what each answer earned, in their order."""
    found = {
      label: [_checked(value) for value in values]
      for label, values in self.rewards.judged(self.asked).items()
    }
    for label, tasks in self.begun.items():
      found[label] = [
        one for task in tasks for one in self.rewards.finished(task)
      ]
    return [self._earned(found, i) for i in range(len(self.asked))]

  def _earned(self, found, i: int) -> Earned:
    parts, failures, total = {}, {}, 0.0
    for term in self.rewards.terms:
      value, failure = found[term.label][i]
      parts[term.label] = value
      if failure:
        failures[term.label] = failure
      else:
        total += term.weight * value
    return Earned(total, parts, failures)


def _ready() -> None:
  """Imports what rewards need."""
  registry.function("number")


def _checked(value: float) -> tuple[float | None, str]:
  return (value, "") if math.isfinite(value) else (None, "not finite")

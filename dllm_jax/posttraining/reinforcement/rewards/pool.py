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
    return self

  def __exit__(self, *exc: Any) -> None:
    self._pool.stop()
    self._pool.join()

  def ask(self, asked: Sequence[Asked]) -> "Pending":
    """Begins to compute the rewards of answers."""
    for future in self._first:
      with contextlib.suppress(Exception):
        future.result()
    self._first = []
    begun = [
      {
        term.label: self._pool.schedule(
          registry.call,
          args=(term, one.prompt, one.completion, dict(one.row)),
          timeout=self._seconds,
        )
        for term in self.terms
        if term.name != registry.JUDGE
      }
      for one in asked
    ]
    return Pending(self, list(asked), begun)

  def judged(self, asked: Sequence[Asked]) -> dict[str, list[float]]:
    """Returns what judges say of answers, by reward: nats per token."""
    found = {}
    for term in self.terms:
      if term.name == registry.JUDGE:
        found[term.label] = self._judge(asked, term.argument)
    return found


class Pending(NamedTuple):
  """Rewards that are under way."""

  rewards: Rewards
  asked: list[Asked]
  begun: list[dict[str, futures.Future]]

  def wait(self) -> list[Earned]:
    """Returns what each answer earned, in their order."""
    judged = self.rewards.judged(self.asked)
    found = []
    for i, begun in enumerate(self.begun):
      parts, failures, total = {}, {}, 0.0
      for term in self.rewards.terms:
        if term.label in judged:
          value, failure = _finite(judged[term.label][i])
        else:
          value, failure = _result(begun[term.label])
        parts[term.label] = value
        if failure:
          failures[term.label] = failure
        else:
          total += term.weight * value
      found.append(Earned(total, parts, failures))
    return found


def _ready() -> None:
  """Imports what rewards need."""
  registry.function("number")


def _result(future: futures.Future) -> tuple[float | None, str]:
  try:
    return _finite(future.result())
  except futures.TimeoutError:
    return None, "timeout"
  except Exception as error:  # pylint: disable=broad-except
    # Whatever a function raises is a failure of its sample.
    return None, type(error).__name__


def _finite(value: float) -> tuple[float | None, str]:
  if math.isfinite(value):
    return value, ""
  return None, "not finite"

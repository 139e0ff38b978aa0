"""The log-likelihood under another model as a reward: `judge[RUN]`.

A judge is an autoregressive run, or a published folder; its network lies on the
same devices, so that it is asked here and not in a process of its own.
"""

from collections.abc import Sequence
import math
from typing import Any

from dllm_jax.posttraining.reinforcement.rewards.registry import JUDGE, Term

_ROWS = 16  # of a batch


def check(terms: Sequence[Term]) -> None:
  """Checks that judges are there.

  Raises:
    ValueError: one is not named.
    FileNotFoundError: one does not exist.
  """
  judges = Judges()
  for term in terms:
    if term.name != JUDGE:
      continue
    if not term.argument:
      raise ValueError(
        "the reward judge needs a model: judge[RUN]=weight, with the directory"
        " of an autoregressive run"
      )
    judges.opened(term.argument)


class Judges:
  """Judges that were opened, by path."""

  def __init__(self):
    self._found: dict[str, Any] = {}

  def opened(self, path: str) -> Any:
    """Returns a judge."""
    if path not in self._found:
      from dllm_jax.evaluation.samples.judge import open_judge  # noqa: PLC0415

      self._found[path] = open_judge(path)
    return self._found[path]

  def __call__(self, asked: Sequence[Any], path: str) -> list[float]:
    """Returns log p(completion | prompt), nats per token, of each answer."""
    judge = self.opened(path)
    texts = [one.prompt + one.completion for one in asked]
    whole = judge.nats(texts, rows=_ROWS)
    prompts = judge.nats([one.prompt or " " for one in asked], rows=_ROWS)
    found = []
    for (nats, tokens), (given, before) in zip(whole, prompts, strict=True):
      count = tokens - before
      found.append((given - nats) / count if count > 0 else math.nan)
    return found

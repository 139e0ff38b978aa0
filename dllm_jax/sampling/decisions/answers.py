r"""Answers of labels' log-probabilities, and how far they can be trusted.

With l_k the log-probability of label k at its slots and T a temperature,

    p_k = exp(l_k / T) / \sum_j exp(l_j / T),

and the mass of the labels is \sum_k exp(l_k): what the network gives to any text
that is none of them is left out of p, and lowers the confidence max_k p_k mass.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np
from scipy import optimize, special

from dllm_jax.core import check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """What the network says to a question.

  Attributes:
    probabilities: of each label; they sum to 1.
    mass: of all labels together, before they were made to.
  """

  probabilities: tuple[float, ...]
  mass: float

  @property
  def best(self) -> int:
    """The likeliest label."""
    return int(np.argmax(self.probabilities))

  @property
  def confidence(self) -> float:
    """The probability of the best label times the labels' mass."""
    return self.probabilities[self.best] * self.mass

  @property
  def mean(self) -> float:
    """The mean of labels' numbers, from 0."""
    return float(np.arange(len(self.probabilities)) @ self.probabilities)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
  """How answers are made of log-probabilities.

  Attributes:
    temperature: divides them; above 0, 1 for the network's own.
  """

  temperature: float = 1.0

  def __post_init__(self):
    check.within("a decision's temperature", self.temperature, "(0, inf)")

  def answer(self, log_probs: Sequence[float]) -> Answer:
    """Returns the answer of labels' log-probabilities."""
    raw = np.asarray(log_probs, np.float64)
    p = special.softmax(raw / self.temperature)
    return Answer(
      probabilities=tuple(p.tolist()), mass=min(float(np.exp(raw).sum()), 1.0)
    )


def fitted(
  log_probs: Sequence[Sequence[float]], truth: Sequence[int]
) -> Calibration:
  """Returns the temperature with the least cross-entropy on known answers.

  Guo et al. 2017 (arXiv:1706.04599, sec. 4.2), between 1/20 and 20.

  Args:
    log_probs: of the labels of each question.
    truth: which of them is right.
  """
  rows = [np.asarray(row, np.float64) for row in log_probs]

  def cost(log_t):
    each = [
      -np.log(np.maximum(special.softmax(row / np.exp(log_t))[k], 1e-300))
      for row, k in zip(rows, truth, strict=True)
    ]
    return float(np.mean(each))

  ends = (-np.log(20.0), np.log(20.0))
  found = optimize.minimize_scalar(cost, bounds=ends, method="bounded")
  return Calibration(temperature=float(np.exp(found.x)))


def calibration_error(
  answers: Sequence[Answer], truth: Sequence[int], *, bins: int = 10
) -> tuple[float, float]:
  r"""Returns the expected calibration error and its standard error.

  \sum_b n_b / n |accuracy_b - confidence_b| over bins of equal width of the best
  label's probability (arXiv:1706.04599, eq. 3); the error by the bootstrap, 200
  draws of the questions.

  Args:
    answers: of each question.
    truth: the right label of each.
    bins: of [0, 1].
  """
  sure = np.array([a.probabilities[a.best] for a in answers])
  right = np.array([a.best for a in answers]) == np.asarray(truth)

  def error(sure, right):
    of = np.minimum((sure * bins).astype(int), bins - 1)
    gap = np.bincount(of, right, bins) - np.bincount(of, sure, bins)
    return float(np.abs(gap).sum() / len(sure))

  rng = np.random.default_rng(0)
  draws = [rng.integers(0, len(sure), len(sure)) for _ in range(200)]
  return error(sure, right), float(
    np.std([error(sure[i], right[i]) for i in draws], ddof=1)
  )

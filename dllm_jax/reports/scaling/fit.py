"""Laws of loss against compute, parameters and tokens, with their intervals.

Two ways of Hoffmann et al. (arXiv:2203.15556):

    IsoFLOP (approach 2)  at each budget C a parabola of the loss over log N; its
                          vertex is the best size N*(C) and the least loss L*(C);
                          log L* = log a - b log C
    parametric (3)        L(N, D) = E + A / N^alpha + B / D^beta, eq. 2, by the
                          Huber loss of log residuals, eq. 3

Intervals are those of the bootstrap over residuals (Efron 1979): residuals of a
fit, drawn anew with replacement, are put on its curve, and all is fitted again.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np

_DRAWS = 200
_HUBER = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
  """A run that is done.

  Attributes:
    config: what it was.
    budget: FLOPs that it could spend.
    parameters: N.
    tokens: D.
    flops: that it spent.
    loss: bits per character, held out.
    error: the standard error of its evaluation.
  """

  config: str
  budget: float
  parameters: int
  tokens: int
  flops: float
  loss: float
  error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimum:
  """The vertex of a budget's parabola.

  Attributes:
    budget: C, FLOPs.
    parameters: N*.
    loss: L*, bits per character.
    inside: whether N* lies among the sizes that were trained.
  """

  budget: float
  parameters: float
  loss: float
  inside: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Law:
  """What was fitted to the points of one configuration.

  Attributes:
    optima: of each budget that has a parabola.
    slope: b of the frontier, None without two optima.
    scale: log a.
    missing: what could not be fitted, in words.
  """

  optima: Sequence[Optimum]
  slope: float | None
  scale: float | None
  missing: Sequence[str]

  def loss(self, budget: float) -> float:
    """L*(C)."""
    return math.exp(self.scale - self.slope * math.log(budget))

  def budget(self, loss: float) -> float:
    """C at which L* is a loss."""
    return math.exp((self.scale - math.log(loss)) / self.slope)


def law(points: Sequence[Point]) -> Law:
  """Returns the IsoFLOP law of one configuration's points."""
  optima, missing = [], []
  for budget in sorted({p.budget for p in points}):
    mine = [p for p in points if p.budget == budget]
    sizes = len({p.parameters for p in mine})
    if sizes < 3:
      missing.append(
        f"{budget:g} FLOPs: {sizes} sizes, and a parabola has 3 parameters"
      )
      continue
    found = _parabola(mine)
    if found is None:
      missing.append(f"{budget:g} FLOPs: the parabola has no lowest point")
    else:
      optima.append(found[0])
  slope = scale = None
  if len(optima) < 2:
    missing.append(
      f"frontier: {len(optima)} budgets with a lowest point, and a line has 2 "
      "parameters"
    )
  else:
    x = np.log([o.budget for o in optima])
    down, scale = np.polyfit(x, np.log([o.loss for o in optima]), 1)
    slope, scale = -float(down), float(scale)
  return Law(optima=optima, slope=slope, scale=scale, missing=missing)


def _parabola(points: Sequence[Point]) -> tuple[Optimum, np.ndarray] | None:
  """Returns the vertex and the fitted losses; None if it opens downwards."""
  x = np.log([p.parameters for p in points])
  y = np.asarray([p.loss for p in points])
  middle = x.mean()
  a, b, c = np.polyfit(x - middle, y, 2)
  if a <= 0:
    return None
  vertex = -b / (2 * a)
  optimum = Optimum(
    budget=points[0].budget,
    parameters=float(np.exp(vertex + middle)),
    loss=float(c - b * b / (4 * a)),
    inside=bool(x.min() <= vertex + middle <= x.max()),
  )
  return optimum, np.polyval([a, b, c], x - middle)


_NAMES = ("E", "A", "B", "alpha", "beta")


def parametric(
  points: Sequence[Point], seed: int = 0
) -> dict[str, dict[str, float]] | None:
  """Returns L(N, D) of points, and the bootstrap's middle 95 % of its parameters.

  Args:
    points: of one configuration.
    seed: of the bootstrap.

  Returns:
    `value`, `low` and `high` of E, A, B, alpha and beta; None with fewer than 6
    points, 2 sizes or 2 numbers of tokens.
  """
  n = np.log([p.parameters for p in points])
  d = np.log([p.tokens for p in points])
  y = np.log([p.loss for p in points])
  if len(points) <= len(_NAMES) or min(len({*n}), len({*d})) < 2:
    return None
  starts = []
  for share in (0.2, 0.5, 0.8):
    for power in (0.2, 0.5):
      rest = math.log(1 - share) + y.mean()
      low = math.log(share) + y.min()
      ends = [rest + power * n.mean(), rest + power * d.mean()]
      starts.append([low, *ends, power, power])
  theta = _surface(n, d, y, starts)
  fitted = _log_loss(theta, n, d)
  residuals = (y - fitted) * math.sqrt(len(y) / (len(y) - len(_NAMES)))
  rng, drawn = np.random.default_rng(seed), []
  for _ in range(_DRAWS):
    again = fitted + rng.choice(residuals, len(y))
    drawn.append(_values(_surface(n, d, again, [theta])))
  low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
  return {
    name: {"value": float(v), "low": float(a), "high": float(b)}
    for name, v, a, b in zip(_NAMES, _values(theta), low, high, strict=True)
  }


def _log_loss(theta, n, d):
  """Returns log L at log N and log D."""
  from scipy.special import logsumexp

  e, a, b, alpha, beta = theta
  whole = [np.full_like(n, e), a - alpha * n, b - beta * d]
  return logsumexp(whole, axis=0)


def _surface(n, d, y, starts) -> np.ndarray:
  """Returns log E, log A, log B, alpha and beta that fit best."""
  from scipy import optimize

  found = [
    optimize.least_squares(
      lambda theta: _log_loss(theta, n, d) - y,
      start,
      loss="huber",
      f_scale=_HUBER,
    )
    for start in starts
  ]
  return min(found, key=lambda one: one.cost).x


def _values(theta) -> np.ndarray:
  return np.concatenate([np.exp(theta[:3]), theta[3:]])


def bootstrapped(points: Sequence[Point], seed: int = 0) -> list[Law]:
  """Returns the law of points whose residuals were drawn anew, many times.

  None where nothing tells how far points scatter: three a budget, all exact.
  """
  rng, groups = np.random.default_rng(seed), []
  for budget in sorted({p.budget for p in points}):
    mine = [p for p in points if p.budget == budget]
    enough = len({p.parameters for p in mine}) >= 3
    found = _parabola(mine) if enough else None
    if found is not None:
      groups.append((mine, found[1]))
  if not groups:
    return []
  # A parabola takes 3 of each budget's freedoms: what is left is made larger.
  left = sum(len(mine) - 3 for mine, _ in groups)
  count = sum(len(mine) for mine, _ in groups)
  residuals = np.concatenate([
    [p.loss for p in mine] - fitted for mine, fitted in groups
  ])
  residuals = residuals * math.sqrt(count / left) if left else None
  if residuals is None and not any(p.error for mine, _ in groups for p in mine):
    return []
  laws = []
  for _ in range(_DRAWS):
    drawn = []
    for mine, fitted in groups:
      if residuals is None:  # nothing is left over: the evaluations' own errors
        noise = rng.normal(size=len(mine)) * [p.error for p in mine]
      else:
        noise = rng.choice(residuals, len(mine))
      drawn += [
        dataclasses.replace(point, loss=float(one))
        for point, one in zip(mine, fitted + noise, strict=True)
      ]
    laws.append(law(drawn))
  return laws


def interval(values: Sequence[float]) -> tuple[float, float]:
  """Returns the middle 95 % of values."""
  low, high = np.percentile(values, [2.5, 97.5])
  return float(low), float(high)


def multiplier(
  reference: Sequence[Point], other: Sequence[Point]
) -> dict[str, Any] | None:
  """Returns how many times the reference's FLOPs another objective needs.

  At the best loss that both reached with the budgets they had; where the better
  one passed that below its smallest budget, or the worse one never came there,
  one law is read beyond its budgets, and `extrapolated` says by how many times.

  Returns:
    `times`, `low`, `high` (the bootstrap's middle 95 %; None without one),
    `loss`, `extrapolated` (1 for not at all); None where one of them has no
    frontier.
  """
  laws = law(reference), law(other)
  if any(one.slope is None or one.slope <= 0 for one in laws):
    return None
  loss = max(min(o.loss for o in one.optima) for one in laws)
  times = lambda a, b: b.budget(loss) / a.budget(loss)
  beyond = max(_beyond(one, loss) for one in laws)
  pairs = zip(bootstrapped(reference, 0), bootstrapped(other, 1), strict=False)
  draws = [
    times(a, b)
    for a, b in pairs
    if a.slope is not None and b.slope is not None and min(a.slope, b.slope) > 0
  ]
  low, high = interval(draws) if draws else (None, None)
  return {
    "times": times(*laws),
    "low": low,
    "high": high,
    "loss": loss,
    "extrapolated": beyond,
  }


def _beyond(one: Law, loss: float) -> float:
  """Returns by how many times a loss lies outside a law's budgets; 1 inside."""
  at, budgets = one.budget(loss), [o.budget for o in one.optima]
  return max(1.0, min(budgets) / at, at / max(budgets))

r"""Selections: how many of the ranked masked slots a step reveals.

A selection is `(seen, progress, steps, objective) -> [B, W] bool`: which
candidates take their drawn token now. Some reveal planned numbers in a known
number of steps; the others look at the network and take as few steps as it
allows, each for an even share of what is left or more. No window stays
unfinished: the last step reveals what is left. `steps` is a number, or one a
row where plans are counted as they go (`paces`).
"""

import abc
import dataclasses
from typing import Literal

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from dllm_jax.core import check
from dllm_jax.core.types import Objective

Steps = int | Int[Array, "B"]


@struct.dataclass
class Progress:
  """How far each row is in its window.

  Attributes:
    step: network calls so far.
    maskable: slots that were masked when the window was entered.
  """

  step: Int[Array, "B"]
  maskable: Int[Array, "B"]


@struct.dataclass
class Seen:
  """What a step saw of its window.

  Attributes:
    candidates: masked slots that may be revealed.
    score: what ranks them, higher first.
    confidence: the probability of each drawn token.
    entropy: of the prediction, nats; None unless asked for.
    uniform: one uniform draw a slot; None unless asked for.
    threshold: each row's own confidence to be revealed by; None for that of the
      selection.
  """

  candidates: Bool[Array, "B W"]
  score: Float[Array, "B W"]
  confidence: Float[Array, "B W"]
  entropy: Float[Array, "B W"] | None = None
  uniform: Float[Array, "B W"] | None = None
  threshold: Float[Array, "B 1"] | None = None

  @property
  def left(self) -> Int[Array, "B"]:
    """The number of candidates."""
    return jnp.sum(self.candidates, axis=1, dtype=jnp.int32)

  def due(self, progress: Progress, steps: Steps) -> Int[Array, "B"]:
    """Returns how many must be revealed now to finish evenly in time.

    1 at the least: of as many steps as slots each may reveal no more.
    """
    rest = jnp.maximum(steps - progress.step, 1)
    return jnp.maximum(-(-self.left // rest), 1)

  def rank(self) -> Int[Array, "B W"]:
    """Returns how many slots come before each, best first, ties by slot."""
    return rank(self.score, self.candidates)

  def best(self, count: Int[Array, "B"]) -> Bool[Array, "B W"]:
    """Returns the `count` best candidates."""
    return self.candidates & (self.rank() < count[:, None])


def rank(
  score: Float[Array, "B W"], among: Bool[Array, "B W"]
) -> Int[Array, "B W"]:
  """Returns how many slots come before each, best first, ties by slot.

  Those that are not among the ranked come last, whatever their scores: as many
  as are wanted of the others are always found.
  """
  score = jnp.nan_to_num(score, nan=jnp.finfo(score.dtype).min)
  score = jnp.where(among, score, -jnp.inf)
  order = jnp.argsort(-score, axis=-1, stable=True)
  return jnp.argsort(order, axis=-1)


def sort(x: Array, order: Int[Array, "B W"]) -> Array:
  """Returns x with slot of rank r at r."""
  return jnp.take_along_axis(x, jnp.argsort(order, axis=-1), axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Selection(abc.ABC):
  """What selections share; see the module."""

  entropy = False
  uniform = False
  paces = True
  """Whether each row may have steps of its own: no plan is made before."""

  def by(self, rule: "Selection") -> "Selection":
    """Returns this selection with another rule, which is that rule."""
    return rule

  @property
  def threshold(self) -> float | None:
    """The confidence that it reveals by, which rows may choose; None for none."""
    return None

  @property
  def part(self) -> int | None:
    """Slots of a window's part that calls may read alone; None for none."""
    return None

  @abc.abstractmethod
  def __call__(
    self, seen: Seen, progress: Progress, steps: Steps, objective: Objective
  ) -> Bool[Array, "B W"]:
    """Returns the slots to reveal."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Even(Selection):
  """Of n masked slots, step i reveals n // steps, one more if i < n % steps.

  LLaDA's plan (arXiv:2502.09992, alg. 5), made when a window is entered.

  Attributes:
    of: n is the number of "masked" slots, or of all in the "window" (SDAR).
    steps: the planned steps, where the policy may take others; None for its
      own. Steps beyond the plan reveal one slot each.
  """

  of: Literal["masked", "window"] = "masked"
  steps: int | None = None

  def quota(
    self, seen: Seen, progress: Progress, steps: Steps
  ) -> Int[Array, "B"]:
    """Returns how many are revealed now."""
    total = progress.maskable
    if self.of == "window":
      total = jnp.full_like(total, seen.candidates.shape[1])
    planned = self.steps or steps
    quota = total // planned + (progress.step < total % planned)
    quota = jnp.where(progress.step < planned, quota, 1)
    return jnp.maximum(quota, seen.due(progress, steps))

  def __call__(self, seen, progress, steps, objective) -> Bool[Array, "B W"]:
    """Returns the slots to reveal."""
    return seen.best(self.quota(seen, progress, steps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Everything(Selection):
  """Reveals every slot: what stays is the revision's choice."""

  def __call__(self, seen, progress, steps, objective) -> Bool[Array, "B W"]:
    """Returns the slots to reveal."""
    return seen.candidates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proportional(Selection):
  """Reveals a share of what is left: round(n (alpha(s) - alpha(t)) / (1 - alpha(t))).

  t and s are even times, of which the first is 1 and the last 0; steps that
  would reveal nothing are left out. Half a slot goes up or down as float32
  says, in which the original makes its plan.

  Attributes:
    curve: alpha(t): "linear", 1 - t, or "cosine", 1 - cos(pi (1 - t) / 2).
  """

  curve: Literal["linear", "cosine"] = "linear"

  paces = False

  def __post_init__(self):
    if self.curve not in ("linear", "cosine"):
      raise ValueError(f"curve must be linear or cosine, not {self.curve!r}")

  def plan(self, steps: int, width: int) -> np.ndarray:
    """Returns how many of n slots each step reveals, `[width + 1, steps]`."""
    t = (np.arange(steps, 0, -1) / steps).astype(np.float32)
    s = (np.arange(steps - 1, -1, -1) / steps).astype(np.float32)
    one = np.float32(1.0)
    if self.curve == "linear":
      alpha = lambda t: one - t
    else:
      alpha = lambda t: one - np.cos(np.float32(np.pi / 2) * (one - t))
    share = one - (one - alpha(s)) / (one - alpha(t))
    left = np.arange(width + 1)
    counts = np.zeros((width + 1, steps), np.int32)
    for i, part in enumerate(share.astype(np.float64)):
      counts[:, i] = np.minimum(np.round(left * part), left)
      left = left - counts[:, i]
    empty_last = np.argsort(counts == 0, axis=1, kind="stable")
    return np.take_along_axis(counts, empty_last, axis=1)

  def __call__(self, seen, progress, steps, objective) -> Bool[Array, "B W"]:
    """Returns the slots to reveal."""
    plan = jnp.asarray(self.plan(steps, seen.candidates.shape[1]))
    step = jnp.minimum(progress.step, steps - 1)
    count = plan[progress.maskable, step]
    return seen.best(jnp.where(step + 1 < steps, count, seen.left))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Truncated(Selection):
  """Reveals floor(n (1 - s / t)) of what is left, all at the last step.

  Dream's rule, on the objective's grid of times (arXiv:2508.15487).
  """

  paces = False

  def __call__(self, seen, progress, steps, objective) -> Bool[Array, "B W"]:
    """Returns the slots to reveal."""
    share, last = _share(progress, steps, objective)
    count = jnp.floor(seen.left * share).astype(jnp.int32)
    return seen.best(jnp.where(last, seen.left, count))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chance(Selection):
  """Reveals each slot with probability 1 - s / t, whatever its score.

  Dream's "origin"; all at the last step.
  """

  uniform = True
  paces = False

  def __call__(self, seen, progress, steps, objective) -> Bool[Array, "B W"]:
    """Returns the slots to reveal."""
    share, last = _share(progress, steps, objective)
    chosen = (seen.uniform < share[:, None]) | last[:, None]
    return seen.candidates & chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosinePlan(Selection):
  """Leaves floor(N cos(pi/2 (i + 1) / steps)) of N slots masked (MaskGIT).

  At least one is revealed, and all at the last step (arXiv:2202.04200).

  Attributes:
    total: N; 0 for the slots that were masked when the window was entered.
    waits: whether the last slot is left for the last step, however soon the plan
      would have it: every step is then a network call (MMaDA).
  """

  total: int = 0
  waits: bool = False

  def __call__(self, seen, progress, steps, objective) -> Bool[Array, "B W"]:
    """Returns the slots to reveal."""
    ratio = (progress.step + 1.0) / steps
    total = self.total or progress.maskable
    keep = jnp.floor(total * jnp.cos(jnp.pi / 2.0 * ratio)).astype(jnp.int32)
    last, left = progress.step + 1 >= steps, seen.left
    if self.waits:
      keep = jnp.maximum(jnp.minimum(left - 1, keep), 1)
      return seen.best(jnp.where(last, left, left - keep))
    return seen.best(jnp.maximum(left - jnp.where(last, 0, keep), 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Threshold(Selection):
  """Reveals all that are surer than a threshold, and the plan's at least.

  If fewer pass it than are planned, the best of the plan are revealed
  (Fast-dLLM, arXiv:2505.22618, plans what is due; SDAR and LLaDA2 more).

  Attributes:
    value: a probability in (0, 1]; 1 reveals what is planned, values near 0
      all at once.
    least: the plan; None for what is due, one of as many steps as slots.
  """

  value: float = 0.9
  least: Even | None = None

  def __post_init__(self):
    check.within("a confidence threshold", self.value, "(0, 1]")

  @property
  def threshold(self) -> float:
    """The confidence that it reveals by."""
    return self.value

  def __call__(self, seen, progress, steps, objective) -> Bool[Array, "B W"]:
    """Returns the slots to reveal."""
    value = self.value if seen.threshold is None else seen.threshold
    sure = seen.candidates & (seen.confidence >= value)
    least = seen.due(progress, steps)
    if self.least is not None:
      least = self.least.quota(seen, progress, steps)
    enough = jnp.sum(sure, axis=1) >= least
    return jnp.where(enough[:, None], sure, seen.best(least))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Factor(Selection):
  """Reveals the first n by score while confidence_n >= 1 - factor / (n + 1).

  The more are revealed together, the surer each has to be (Fast-dLLM,
  arXiv:2505.22618, thm. 1); what is due is revealed anyway.

  Attributes:
    value: above 0; small values reveal what is due, large ones all at once.
  """

  value: float = 1.0

  def __post_init__(self):
    if not 0.0 < self.value < float("inf"):
      raise ValueError(f"a confidence factor must be above 0, not {self.value}")

  def __call__(self, seen, progress, steps, objective) -> Bool[Array, "B W"]:
    """Returns the slots to reveal."""
    order = seen.rank()
    sure = sort(jnp.where(seen.candidates, seen.confidence, -1.0), order)
    n = jnp.arange(1, sure.shape[1] + 1)
    passed = sure >= 1.0 - self.value / (n + 1)
    count = jnp.sum(jnp.cumprod(passed, axis=1), axis=1)
    return seen.best(jnp.maximum(count, seen.due(progress, steps)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyBound(Selection):
  """Reveals the first n by score with sum_n H - max_n H <= bound (EB).

  The left side bounds how far joint and product law are apart
  (arXiv:2505.24857, eq. 8); what is due is revealed anyway.

  Attributes:
    value: gamma in nats; 0 reveals what is due.
  """

  value: float = 0.1
  entropy = True

  def __post_init__(self):
    if not 0.0 <= self.value < float("inf"):
      raise ValueError(f"an entropy bound must be 0 or more, not {self.value}")

  def __call__(self, seen, progress, steps, objective) -> Bool[Array, "B W"]:
    """Returns the slots to reveal."""
    order = seen.rank()
    h = sort(jnp.where(seen.candidates, seen.entropy, jnp.inf), order)
    passed = bounded(h, self.value)
    count = jnp.sum(jnp.cumprod(passed, axis=1), axis=1)
    return seen.best(jnp.maximum(count, seen.due(progress, steps)))


def bounded(h: Float[Array, "B W"], bound: float) -> Bool[Array, "B W"]:
  """Returns where sums of h from the left, the greatest left out, are bounded."""
  finite = jnp.where(jnp.isfinite(h), h, 0.0)
  total = jnp.cumsum(finite, axis=1)
  most = jax.lax.cummax(finite, axis=1)
  passed = (total - most <= bound) & jnp.isfinite(h)
  return passed.at[:, 0].set(True)


def _share(
  progress: Progress, steps: int, objective: Objective
) -> tuple[Float[Array, "B"], Bool[Array, "B"]]:
  """Returns 1 - s / t of each row's step, and whether it is the last."""
  grid = objective.grid(steps)
  t = jnp.take(grid, progress.step, mode="clip")
  s = jnp.take(grid, progress.step + 1, mode="clip")
  return 1.0 - s / t, progress.step + 1 >= steps

r"""TraceRL: log-likelihoods along the trajectory that was sampled (arXiv:2509.06949).

Answers are asked for as they were revealed: s steps of the sampler make a round,
and view k masks what was revealed in round k or later and asks for round k. In
block diffusion rounds are counted inside each block, and a view takes one of
every block at once.

    L = mean over views of [ -1/|T| sum_T S(r_i) + beta sum_T k3_i ]

with T what a view asks for. The divergence is that from the old policy; there is
no reference. `masking` "random" and "coupled" take random masks instead, as
UniGRPO does (arXiv:2505.15809).
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int
import numpy as np

from dllm_jax.core import check
from dllm_jax.objectives.base import check_choice
from dllm_jax.posttraining.likelihood import Masks
from dllm_jax.posttraining.reinforcement.methods import surrogate
from dllm_jax.posttraining.reinforcement.methods.advantages import Scale
from dllm_jax.posttraining.reinforcement.methods.base import (
  Lost,
  masks,
  Method,
)
from dllm_jax.posttraining.reinforcement.rollouts import (
  Rollouts,
  row_uniforms,
)

Masking = Literal["trajectory", "random", "coupled"]
Average = Literal["targets", "length"]
Ends = Literal["answer", "view"]


def rounds(
  revealed_at: Int[np.ndarray, "B L"],
  region: Bool[np.ndarray, "B L"],
  shrink: int,
  block: int | None = None,
) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B L"]]:
  """Returns the round of each sampled slot, and its last step; -1 elsewhere.

  Args:
    revealed_at: the step at which each slot was revealed.
    region: the slots that were sampled.
    shrink: distinct steps that make a round.
    block: slots of a block, counted from slot 0; None: rounds of the whole.
  """
  found = np.full(region.shape, -1, np.int32)
  last = np.full(region.shape, -1, np.int32)
  size = block or region.shape[1]
  for row in range(len(region)):
    for start in range(0, region.shape[1], size):
      at = np.flatnonzero(region[row, start : start + size]) + start
      steps = np.unique(revealed_at[row, at])
      number = np.searchsorted(steps, revealed_at[row, at]) // shrink
      found[row, at] = number
      ends = np.minimum((number + 1) * shrink, len(steps)) - 1
      last[row, at] = steps[ends] if len(at) else 0
  return found, last


def kept_ends(
  ending: Bool[Array, "B n L"], asked: Bool[Array, "B n L"], most: int
) -> Bool[Array, "B n L"]:
  """Returns what is asked for but for ends beyond the first few that are."""
  ends = ending & asked
  return asked & ~(ends & (jnp.cumsum(ends, axis=2) > most))


def trajectory_views(
  objective, batch: Rollouts, count: int, ends: int, ends_of: Ends
) -> Masks:
  """Returns the views of rounds 0 .. count - 1; some may ask for nothing."""
  number = jnp.arange(count)[:, None]
  region, at = batch.region[:, None], batch.round[:, None]
  asked = _asked(batch, region & (at == number), ends, ends_of)
  return masks(objective, batch, region & (at >= number), asked)


def random_views(
  objective,
  batch: Rollouts,
  masked: Bool[Array, "B n L"],
  ends: int,
  ends_of: Ends,
  *,
  coupled: bool,
) -> Masks:
  """Returns views of random masks, then (where wanted) of their complements.

  Where ends are counted in the answer, those that do not count are masked in
  every view; else they are masked as all else is.
  """
  region = batch.region[:, None]
  whole = ends_of == "answer"
  within = _asked(batch, region, ends, ends_of) if whole else region
  masked = within & masked
  hidden = [masked, within & ~masked] if coupled else [masked]
  hidden = jnp.concatenate(hidden, axis=1)
  asked = _asked(batch, hidden, ends, ends_of)
  return masks(objective, batch, hidden | (region & ~within), asked)


def _asked(
  batch: Rollouts, hidden: Bool[Array, "B n L"], ends: int, ends_of: Ends
) -> Bool[Array, "B n L"]:
  """Returns what is asked for of what a view hides."""
  ending = batch.ending[:, None]
  if ends_of == "view":
    return kept_ends(ending, hidden, ends)
  return hidden & kept_ends(ending, batch.region[:, None], ends)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TraceRL(Method):
  """TraceRL (Wang et al. 2025); defaults are those for LLaDA and Dream.

  For block diffusion the recipe has `shrink` 1, `average` "length", `clamp` 10,
  `ends_of` "view" and groups of 16.

  Attributes:
    clip_low: ratios are clipped at 1 - clip_low,
    clip_high: and at 1 + clip_high.
    kl: how the divergence from the old policy is estimated.
    shrink: steps of the sampler that make a round.
    masking: what views mask: what was not yet revealed, or at random.
    samples: random masks of an answer.
    rate_low: the least rate of those,
    rate_high: and the largest.
    rates: a rate for each mask, or for each of its slots.
    views_a_row: the most rounds of an answer; 0 for as many as the sampler may have.
    ends: how many of the tokens that end an answer and fill it up count;
      the original has 0, and teaches no end.
    ends_of: whether those are counted in the answer or in each view.
    average: policy terms are averaged over what a view asks for, and divergences
      summed; or both are divided by the slots of an answer.
    clamp: the most that log ratios count, nats; 0 for no such bound.
    keep_low: the least mean reward of a group that is trained on,
    keep_high: and the largest.
    value: whether a second network says what a step is worth (`value`).
    discount: gamma of its advantages.
    trace: lambda of its advantages.
  """

  beta: float = 0.01
  group: int = 8
  scale: Scale = "population_std"
  clip_low: float = 0.2
  clip_high: float = 0.2
  kl: surrogate.Divergence = "k3"
  shrink: int = 8
  masking: Masking = "trajectory"
  samples: int = 35
  rate_low: float = 0.1
  rate_high: float = 0.9
  rates: Literal["view", "slot"] = "view"
  views_a_row: int = 0
  ends: int = 1
  ends_of: Ends = "answer"
  average: Average = "targets"
  clamp: float = 0.0
  keep_low: float = 0.2
  keep_high: float = 0.8
  value: bool = False
  discount: float = 1.0
  trace: float = 1.0

  name: ClassVar[str] = "tracerl"
  by_trajectory: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    check.at_least(self, 1, "shrink", "samples", prefix="tracerl.")
    check.at_least(self, 0, "clip_low", "clip_high", "clamp", prefix="tracerl.")
    check.at_least(self, 0, "views_a_row", "ends", prefix="tracerl.")
    for field in ("rate_low", "rate_high", "discount", "trace"):
      check.within(f"tracerl.{field}", getattr(self, field), "[0, 1]")
    for field, legal in (
      ("masking", Masking),
      ("average", Average),
      ("ends_of", Ends),
      ("kl", surrogate.Divergence),
      ("rates", Literal["view", "slot"]),
    ):
      check_choice(f"tracerl.{field}", getattr(self, field), legal)
    if self.value and self.masking != "trajectory":
      raise ValueError(
        "a value model is of trajectories: set tracerl.masking to trajectory, or"
        " tracerl.value to False"
      )

  @property
  def asks_reference(self) -> bool:
    """No: divergence is measured from the old policy."""
    return False

  def keeps(self, rewards):
    """Returns the groups whose mean reward is neither too low nor too high."""
    mean = rewards.mean(axis=1)
    return (self.keep_low <= mean) & (mean <= self.keep_high)

  def count(self, batch: Rollouts) -> int:
    """Returns the views of a row."""
    if self.masking == "random":
      return self.samples
    if self.masking == "coupled":
      return 2 * self.samples
    return self.views_a_row or -(-batch.tokens.shape[1] // self.shrink)

  def rounds(self, batch, revealed_at, objective):
    """Returns rounds and their last steps, of each block for itself."""
    block = objective.block_length
    return rounds(revealed_at, batch.region, self.shrink, block)

  def views(self, objective, process, batch):
    """Returns the views of each row."""
    if self.masking == "trajectory":
      return trajectory_views(
        objective, batch, self.count(batch), self.ends, self.ends_of
      )
    n, length = self.samples, batch.tokens.shape[1]
    u = row_uniforms(batch, 2, n, length)
    rate = u[:, 0] if self.rates == "slot" else u[:, 0, :, :1]
    rate = self.rate_low + (self.rate_high - self.rate_low) * rate
    return random_views(
      objective,
      batch,
      u[:, 1] < rate,
      self.ends,
      self.ends_of,
      coupled=self.masking == "coupled",
    )

  def scores(self, objective, process, denoise, views, batch):
    """Returns log p of each token in each view, `[B, L, n]`, nats."""
    terms = self.terms(objective, process, denoise, views, batch)
    return jnp.moveaxis(terms, 1, 2)

  def loss(self, scores, views, batch) -> Lost:
    """Returns the loss. Metrics: `clip_fraction` and `kl`, means over tokens."""
    used = jnp.any(batch.loss_mask, axis=1)[:, None, None]
    asked = jnp.moveaxis(views.weight != 0, 1, 2) & used  # [B, L, n]
    old = surrogate.before(scores, batch.old)
    gain = jnp.where(asked, scores - old, 0.0)
    if self.clamp:
      gain = jnp.clip(gain, -self.clamp, self.clamp)
    kept, clipped = surrogate.clipped(
      gain,
      batch.advantage[..., None],
      low=self.clip_low,
      high=self.clip_high,
    )
    kl = surrogate.divergence(self.kl, gain, 0.0)
    targets = jnp.sum(asked, axis=1)  # [B, n]
    total = lambda values: jnp.sum(jnp.where(asked, values, 0.0), axis=1)
    slots = jnp.maximum(jnp.sum(batch.region, axis=1), 1)[:, None]
    by_length = self.average == "length"
    policy = -total(kept) / (slots if by_length else jnp.maximum(targets, 1))
    apart = self.beta * total(kl) / (slots if by_length else 1)
    return Lost(
      total=jnp.sum(policy + apart),
      weight=jnp.sum(targets > 0, dtype=jnp.float32),
      metrics={
        "clip_fraction": surrogate.mean(clipped, asked),
        "kl": surrogate.mean(kl, asked),
      },
    )

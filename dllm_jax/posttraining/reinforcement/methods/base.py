"""What a method is: masks of rollouts, a score of them, a loss of scores.

    Rollouts -> views (what is masked) -> scores (network) -> loss

The three are apart, so that each can be held against the original alone and so
that the old policy and the reference can be asked of the same views.
"""

import abc
import dataclasses
from typing import Any, ClassVar

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree
import numpy as np

from dllm_jax.core import check
from dllm_jax.core.types import (
  Denoise,
  Denoiser,
  Loss,
  Objective,
  Process,
)
from dllm_jax.objectives.base import check_choice
from dllm_jax.posttraining import likelihood
from dllm_jax.posttraining.likelihood import Masks
from dllm_jax.posttraining.objective import InPlaceOf
from dllm_jax.posttraining.reinforcement.methods import value
from dllm_jax.posttraining.reinforcement.methods.advantages import (
  Baseline,
  Scale,
)
from dllm_jax.posttraining.reinforcement.rollouts import Rollouts, Tail, texts


@struct.dataclass
class Lost:
  """The loss of some rows, as a sum and what it is divided by.

  Attributes:
    total: the summed loss, differentiable.
    weight: what the sum over all microbatches is divided by.
    metrics: means by name.
  """

  total: Float[Array, ""]
  weight: Float[Array, ""]
  metrics: dict[str, Float[Array, ""]] = struct.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method(abc.ABC):
  """What all methods are told.

  Attributes:
    group: rollouts of a prompt (G).
    iterations: passes over the rollouts of an iteration, each with masks of its
      own.
    fresh_masks: whether they are; else all passes have the masks of the first.
    baseline: what is subtracted from a reward, see `advantages`.
    scale: what that is divided by.
    beta: factor of the divergence from the reference, or from the old policy
      where the method says so.
    tail: whether what stands behind an answer's end is seen.
  """

  group: int = 6
  iterations: int = 1
  fresh_masks: bool = True
  baseline: Baseline = "mean"
  scale: Scale = "none"
  beta: float = 0.0
  tail: Tail = "seen"

  name: ClassVar[str] = ""
  by_ratio: ClassVar[bool] = True
  """Whether the old policy is asked."""
  by_trajectory: ClassVar[bool] = False
  """Whether it matters when a token was revealed."""

  def __post_init__(self):
    check.at_least(self, 1, "iterations", prefix=f"{self.name}.")
    check.at_least(self, 2, "group", prefix=f"{self.name}.")
    check.at_least(self, 0, "beta", prefix=f"{self.name}.")
    for field, legal in (
      ("baseline", Baseline), ("scale", Scale), ("tail", Tail)
    ):  # fmt: skip
      check_choice(f"{self.name}.{field}", getattr(self, field), legal)

  @property
  def asks_reference(self) -> bool:
    """Whether the reference is asked."""
    return self.beta > 0.0

  def check(self, objective: Objective) -> None:
    """Checks that a network can be trained so.

    Raises:
      ValueError: it is no masked diffusion of the kind that the method needs.
    """
    likelihood.check_objective(objective)

  def rounds(
    self, batch: Rollouts, revealed_at: Any, objective: Objective
  ) -> tuple[Any, Any]:
    """Returns `Rollouts.round` of rows, and when each ended; mostly nothing."""
    return batch.round, batch.round

  def coefficients(self, advantage: Any) -> Any:
    """Returns what rows of an update's batch count, given their advantages."""
    return advantage

  def keeps(self, rewards: Any) -> Any:
    """Returns which groups are trained on, given the rewards `[N, G]`."""
    return np.ones(len(rewards), bool)

  @abc.abstractmethod
  def views(
    self, objective: Objective, process: Process, batch: Rollouts
  ) -> Masks:
    """Returns what is masked of each row, a function of the rows alone."""

  @abc.abstractmethod
  def scores(
    self,
    objective: Objective,
    process: Process,
    denoise: Denoise,
    views: Masks,
    batch: Rollouts,
  ) -> PyTree:
    """Returns what the policy says of each row, `[B]` or `[B, L, ...]`, nats."""

  @abc.abstractmethod
  def loss(self, scores: PyTree, views: Masks, batch: Rollouts) -> Lost:
    """Returns the loss of scores."""

  def terms(
    self,
    objective: Objective,
    process: Process,
    denoise: Denoise,
    views: Masks,
    batch: Rollouts,
    *,
    guidance: float = 0.0,
  ) -> Float[Array, "B n L"]:
    """Returns `likelihood.log_terms` of the rows' views."""
    return likelihood.log_terms(
      objective,
      process,
      denoise,
      views,
      texts(batch, self.tail),
      guidance=guidance,
    )


def masks(
  objective: Objective,
  batch: Rollouts,
  hidden: Array,
  weight: Array,
) -> Masks:
  """Returns views that hide some slots and ask, with weights, for others.

  Networks that are told the time are told that of the share of the region that
  is hidden.

  Args:
    objective: has the mask.
    batch: the rows.
    hidden: slots that are masked, `[B, n, L]`.
    weight: of slots that are asked for, `[B, n, L]`; 0 elsewhere.
  """
  tokens = batch.tokens[:, None]
  region = jnp.maximum(jnp.sum(batch.region, axis=1), 1)[:, None, None]
  share = jnp.sum(hidden & batch.region[:, None], axis=2, keepdims=True)
  return Masks(
    z=jnp.where(hidden, objective.mask_id, tokens),
    weight=jnp.broadcast_to(weight, hidden.shape).astype(jnp.float32),
    t=objective.when(share / region)
    if objective.reads_time
    else share / region,
  )


def fewest(
  order: Float[Array, "B n L"],
  among: Bool[Array, "B #n L"],
  number: Float[Array, "B n"] | Int[Array, "B n"],
) -> Bool[Array, "B n L"]:
  """Returns the first of some slots by a random order, as many as told."""
  order = jnp.where(among, order, 2.0)
  rank = jnp.argsort(jnp.argsort(order, axis=2), axis=2)
  return among & (rank < number[..., None])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reinforced(InPlaceOf):
  """The loss of a method, as a `Trainer` minimises it.

  Attributes:
    method: how it is trained.
    denoiser: the network, of a value model too.
  """

  method: Method
  denoiser: Denoiser

  def draw(
    self,
    process: Process,
    key: Key[Array, ""],
    batch: Rollouts,
    *,
    step: Int[Array, ""],
  ) -> Masks:
    """Returns what is masked, by the seeds of rows and not by the step."""
    return self.method.views(self.objective, process, batch)

  def loss(
    self,
    process: Process,
    denoise: Denoise,
    drawn: Masks,
    batch: Rollouts,
    *,
    step: Int[Array, ""],
  ) -> Loss:
    """Returns the method's loss; the bound is 0."""
    scores = self.method.scores(self.objective, process, denoise, drawn, batch)
    lost = self.method.loss(scores, drawn, batch)
    total, metrics = lost.total, dict(lost.metrics)
    if batch.returns is not None:
      new = self.values(process, drawn, batch)
      apart = value.value_loss(new, drawn, batch, self.method.clip_low)
      metrics["value_loss"] = apart / jnp.maximum(lost.weight, 1.0)
      total += apart
    return Loss(
      total=total,
      weight=lost.weight,
      bound=jnp.zeros(batch.tokens.shape, jnp.float32),
      metrics=jax.lax.stop_gradient(metrics),
    )

  def values(
    self, process: Process, views: Masks, batch: Rollouts
  ) -> Float[Array, "B L"]:
    """Returns what the value model says, whose parameters the process has."""
    own = process.params["value"]
    apply = self.denoiser.apply
    denoise = lambda inputs: apply(own["model"], inputs, None)[0]
    process = process.replace(params={})
    return value.values(
      self.objective, process, denoise, own["head"], views, batch
    )

r"""ESPO: a ratio of sequences by bounds of their likelihood (arXiv:2512.03759).

x of an answer's C slots are masked, x even in 0..C and stratified over the rows
of a batch, and the others in a second view:

    B = mean over samples of 1/2 [ sum_M log p (C+1)/x
                                   + sum_not M log p' (C+1)/(C-x) ]
    L = mean over rows of [ -S(exp((B - B_old) / C)) + beta (B - B_ref)^2 / 2C ]

The score is that of the region, what fills it up included.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.core import check
from dllm_jax.objectives.base import check_choice
from dllm_jax.posttraining.likelihood import Masks
from dllm_jax.posttraining.reinforcement.methods import surrogate
from dllm_jax.posttraining.reinforcement.methods.advantages import Baseline
from dllm_jax.posttraining.reinforcement.methods.base import (
  fewest,
  Lost,
  masks,
  Method,
)
from dllm_jax.posttraining.reinforcement.rollouts import (
  batch_key,
  Rollouts,
  row_uniforms,
)


def counts(
  first: Int[Array, "m"], place: Float[Array, "B"], slots: Int[Array, "B 1"]
) -> Int[Array, "B m"]:
  """Returns x of each row and sample: `round(k + place (C + 1)) mod (C + 1)`.

  Args:
    first: k of each sample, in 0..C.
    place: j / b of row j of b.
    slots: C of each row.
  """
  spread = place[:, None] * (slots + 1)
  return jnp.round(first + spread).astype(jnp.int32) % (slots + 1)


def pair_views(
  objective,
  batch: Rollouts,
  masked: Bool[Array, "B m L"],
  number: Int[Array, "B m"],
  both: bool,
) -> Masks:
  """Returns each mask, then (where wanted) its complement: `[B, 2 m, L]`.

  Args:
    objective: has the mask.
    batch: the rows.
    masked: the masks, inside the region.
    number: how many slots each has.
    both: whether complements are asked, too; the terms are then halved.
  """
  region = batch.region[:, None]
  slots = jnp.sum(region, axis=2)
  factor = lambda n: ((slots + 1) / jnp.maximum(n, 1))[..., None]
  first = masked * factor(number)
  if not both:
    return masks(objective, batch, masked, first)
  other = region & ~masked
  second = other * factor(slots - number)
  return masks(
    objective,
    batch,
    jnp.concatenate([masked, other], axis=1),
    0.5 * jnp.concatenate([first, second], axis=1),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ESPO(Method):
  """ESPO (Ou et al. 2025).

  Attributes:
    clip_low: ratios are clipped at 1 - clip_low,
    clip_high: and at 1 + clip_high.
    samples: masks of an answer (num_mc); recipes take 2.
    complement: whether each has its complement beside it (reduce_var).
    kl: how the divergence is estimated.
  """

  beta: float = 0.01
  group: int = 10
  iterations: int = 2
  baseline: Baseline = "leave_one_out"
  clip_low: float = 0.2
  clip_high: float = 0.2
  samples: int = 1
  complement: bool = True
  kl: surrogate.Divergence = "k2"

  name: ClassVar[str] = "espo"

  def __post_init__(self):
    super().__post_init__()
    check.at_least(self, 0, "clip_low", "clip_high", prefix="espo.")
    check.at_least(self, 1, "samples", prefix="espo.")
    check_choice("espo.kl", self.kl, surrogate.Divergence)

  def views(self, objective, process, batch):
    """Returns the masks of each row, stratified over the batch."""
    length = batch.tokens.shape[1]
    slots = jnp.sum(batch.region, axis=1)[:, None]
    keys = jax.random.split(batch_key(batch), self.samples)
    u = jax.vmap(jax.random.uniform)(keys)
    first = jnp.floor(u * (slots[0, 0] + 1)).astype(jnp.int32)
    number = counts(first, batch.place, slots)
    order = row_uniforms(batch, self.samples, length)
    masked = fewest(order, batch.region[:, None], number)
    return pair_views(objective, batch, masked, number, self.complement)

  def scores(self, objective, process, denoise, views, batch):
    """Returns B of each answer, nats."""
    terms = self.terms(objective, process, denoise, views, batch)
    return jnp.sum(terms, axis=(1, 2)) / self.samples

  def loss(self, scores, views, batch) -> Lost:
    """Returns the loss. Metrics: `clip_fraction` and `kl`, means over rows."""
    slots = jnp.maximum(jnp.sum(batch.region, axis=1), 1)
    used = jnp.any(batch.loss_mask, axis=1)
    kept, clipped = surrogate.clipped(
      (scores - surrogate.before(scores, batch.old)) / slots,
      batch.advantage[:, 0],
      low=self.clip_low,
      high=self.clip_high,
    )
    metrics = {"clip_fraction": surrogate.mean(clipped, used)}
    each = -kept
    if batch.reference is not None:
      kl = self.divergence(scores, batch.reference) / slots
      each += self.beta * kl
      metrics["kl"] = surrogate.mean(kl, used)
    return Lost(
      total=jnp.sum(jnp.where(used, each, 0.0)),
      weight=jnp.sum(used, dtype=jnp.float32),
      metrics=metrics,
    )

  def divergence(self, scores, reference):
    """Returns the estimate of the divergence of sequences.

    "k1" has the gradient (1 + d) grad score: that of its expectation.
    """
    found = surrogate.divergence(self.kl, scores, reference)
    if self.kl == "k1":
      still = jax.lax.stop_gradient
      found += still(found) * (scores - still(scores))
    return found

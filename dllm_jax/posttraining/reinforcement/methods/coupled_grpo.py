r"""Coupled-GRPO: a mask and its complement (DiffuCoder, arXiv:2506.20639).

Three views: the answer masked whole, and a mask M of ratio rho with its
complement, rho even in [0.2, 0.8] for a whole batch. Every token is asked for
twice:

    score_i = 1/2 [ log p_0 + 1[i in M] log p_1 / rho
                            + 1[i not in M] log p_2 / (1 - rho) ]

and enters the loss of diffu-GRPO. The prompt is never masked.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dllm_jax.posttraining.likelihood import Masks
from dllm_jax.posttraining.reinforcement.methods.advantages import Baseline
from dllm_jax.posttraining.reinforcement.methods.base import masks
from dllm_jax.posttraining.reinforcement.methods.diffu_grpo import TokenRatios
from dllm_jax.posttraining.reinforcement.rollouts import (
  batch_key,
  Rollouts,
  row_uniforms,
)


def coupled_views(
  objective,
  batch: Rollouts,
  uniform: Float[Array, "B L"],
  ratio: Float[Array, ""],
) -> Masks:
  """Returns the three views of a draw.

  Where u = rho, a token is in neither mask, as in the original.
  """
  region = batch.region
  under, over = uniform < ratio, uniform > ratio
  hidden = jnp.stack([region, region & under, region & over], axis=1)
  factor = jnp.stack([jnp.ones(()), 1 / ratio, 1 / (1 - ratio)])
  weight = hidden & batch.loss_mask[:, None]
  return masks(objective, batch, hidden, weight * factor[:, None])


@dataclasses.dataclass(frozen=True, kw_only=True)
class CoupledGRPO(TokenRatios):
  """Coupled-GRPO (Gong et al. 2025).

  Attributes:
    ratio_low: the least share of an answer that is masked,
    ratio_high: and the largest.
  """

  beta: float = 0.01
  group: int = 10
  iterations: int = 2
  baseline: Baseline = "leave_one_out"
  ratio_low: float = 0.2
  ratio_high: float = 0.8

  name: ClassVar[str] = "coupled_grpo"

  def __post_init__(self):
    super().__post_init__()
    if not 0.0 < self.ratio_low <= self.ratio_high < 1.0:
      raise ValueError(
        "coupled_grpo.ratio_low and ratio_high must lie in (0, 1) in this order,"
        f" not {self.ratio_low} and {self.ratio_high}"
      )

  def views(self, objective, process, batch):
    """Returns the three views, of one ratio for the batch."""
    ratio = jax.random.uniform(
      batch_key(batch), (), minval=self.ratio_low, maxval=self.ratio_high
    )
    uniform = row_uniforms(batch, batch.tokens.shape[1])
    return coupled_views(objective, batch, uniform, ratio)

  def scores(self, objective, process, denoise, views, batch):
    """Returns the score of each token."""
    terms = self.terms(objective, process, denoise, views, batch)
    return 0.5 * jnp.sum(terms, axis=1)

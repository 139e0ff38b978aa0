r"""wd1: a weighted log-likelihood without ratios (arXiv:2507.08838).

    L = - sum_k softmax(A)_k score_k + sum_k softmax(-A)_k score_k

over the rollouts k of an update's batch, `score_k` the sum of diffu-GRPO's over
the tokens of an answer. Neither the old policy nor a reference is asked; where
all rewards are equal the terms cancel.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from scipy import special

from dllm_jax.core import check
from dllm_jax.posttraining.reinforcement.methods.base import Lost, Method
from dllm_jax.posttraining.reinforcement.methods.diffu_grpo import (
  check_prompts,
  mean_field,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WD1(Method):
  """wd1 (Tang et al. 2025).

  Attributes:
    prompt_rate: the probability that a token of the prompt is masked.
    positive_only: whether only the first term is taken.
  """

  iterations: int = 12
  prompt_rate: float = 0.15
  positive_only: bool = False

  name: ClassVar[str] = "wd1"
  by_ratio: ClassVar[bool] = False

  def __post_init__(self):
    super().__post_init__()
    check.within(f"{self.name}.prompt_rate", self.prompt_rate, "[0, 1)")

  @property
  def asks_reference(self) -> bool:
    """No: its beta has no use."""
    return False

  def check(self, objective) -> None:
    """Checks that prompts may be masked."""
    super().check(objective)
    check_prompts(self.name, self.prompt_rate, objective)

  def coefficients(self, advantage):
    """Returns softmax(A) - softmax(-A), over rows."""
    found = special.softmax(advantage)
    if self.positive_only:
      return found
    return found - special.softmax(-advantage)

  def views(self, objective, process, batch):
    """Returns one view: the answer hidden, and a part of the prompt."""
    return mean_field(objective, batch, self.prompt_rate)

  def scores(self, objective, process, denoise, views, batch):
    """Returns the summed log p of each answer, nats."""
    terms = self.terms(objective, process, denoise, views, batch)
    return jnp.sum(terms, axis=(1, 2))

  def loss(self, scores, views, batch) -> Lost:
    """Returns the loss: a sum, divided by 1 over a whole batch.

    A batch's rows share that 1: microbatches have equal parts of it.
    """
    total = -jnp.sum(batch.advantage[:, 0] * scores)
    # `share` of each row is 1 over the rows of the batch.
    return Lost(total=total, weight=jnp.sum(batch.share))

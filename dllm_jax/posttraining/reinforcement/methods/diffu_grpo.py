r"""diffu-GRPO: one pass over a wholly masked answer (d1, arXiv:2504.12216).

The answer is masked whole, each token of the prompt with a small probability;
every token is read from that one output, a mean field:

    score_i = log p(y_i | prompt with masks, m ... m)
    L = sum_i [ -S(r_i) + beta k3(score_i, reference_i) ] / number of tokens

The masks of the prompt make passes over the same rollouts differ.
"""

import dataclasses
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dllm_jax.core import check
from dllm_jax.objectives.base import check_choice
from dllm_jax.posttraining.likelihood import Masks
from dllm_jax.posttraining.reinforcement.methods import surrogate
from dllm_jax.posttraining.reinforcement.methods.base import (
  Lost,
  masks,
  Method,
)
from dllm_jax.posttraining.reinforcement.rollouts import (
  Rollouts,
  row_uniforms,
)

Average = Literal["token", "sequence", "constant"]


def prompt_and_answer(
  uniform: Float[Array, "B L"], rate: float, batch: Rollouts
) -> Bool[Array, "B L"]:
  """Returns what is hidden: the region, and prompt tokens with u < rate."""
  return batch.region | (uniform < rate)


def mean_field(objective, batch: Rollouts, rate: float) -> Masks:
  """Returns one view: the answer hidden, and a part of the prompt."""
  uniform = row_uniforms(batch, batch.tokens.shape[1])
  hidden = prompt_and_answer(uniform, rate, batch)
  weight = batch.loss_mask[:, None]
  return masks(objective, batch, hidden[:, None], weight)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRatios(Method):
  """A loss of a ratio for each token, as GRPO has it (arXiv:2402.03300).

  Attributes:
    clip_low: ratios are clipped at 1 - clip_low,
    clip_high: and at 1 + clip_high.
    cap: the most that an unclipped ratio counts (trl's delta); 0 for no
      such bound.
    average: over the batch's tokens (trl's bnpo), over each answer's and then
      over answers (grpo), or over answers as if all filled the region (dr_grpo).
  """

  clip_low: float = 0.5
  clip_high: float = 0.5
  cap: float = 0.0
  average: Average = "token"

  def __post_init__(self):
    super().__post_init__()
    check.at_least(
      self, 0, "clip_low", "clip_high", "cap", prefix=f"{self.name}."
    )
    check_choice(f"{self.name}.average", self.average, Average)

  def loss(self, scores, views, batch) -> Lost:
    """Returns the loss. Metrics: `clip_fraction` and `kl`, means over tokens."""
    gain = scores - surrogate.before(scores, batch.old)
    kept, clipped = surrogate.clipped(
      gain,
      batch.advantage,
      low=self.clip_low,
      high=self.clip_high,
      cap=self.cap or None,
    )
    counts = batch.loss_mask
    metrics = {"clip_fraction": surrogate.mean(clipped, counts)}
    each = -kept
    if batch.reference is not None:
      kl = surrogate.divergence("k3", scores, batch.reference)
      each += self.beta * kl
      metrics["kl"] = surrogate.mean(kl, counts)
    factor = counts.astype(jnp.float32)
    tokens = jnp.sum(factor, axis=1, keepdims=True)
    used = (tokens > 0).astype(jnp.float32)
    weight = jnp.sum(factor if self.average == "token" else used)
    if self.average == "sequence":
      factor /= jnp.maximum(tokens, 1.0)
    elif self.average == "constant":
      factor /= jnp.sum(batch.region, axis=1, keepdims=True)
    # Where: a slot that does not count may hold any number.
    total = jnp.sum(jnp.where(counts, factor * each, 0.0))
    return Lost(total=total, weight=weight, metrics=metrics)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffuGRPO(TokenRatios):
  """diffu-GRPO (Zhao et al. 2025); defaults are d1's.

  The port of dllm hides what stands behind an answer (`tail="hidden"`), has
  `prompt_rate` 0.3 and trl's clipping at 0.2.

  Attributes:
    prompt_rate: the probability that a token of the prompt is masked.
    guidance: of prompts, as in sampling (cfg_scale).
  """

  beta: float = 0.04
  iterations: int = 12
  prompt_rate: float = 0.15
  guidance: float = 0.0

  name: ClassVar[str] = "diffu_grpo"

  def __post_init__(self):
    super().__post_init__()
    check.within(f"{self.name}.prompt_rate", self.prompt_rate, "[0, 1)")

  def check(self, objective) -> None:
    """Checks that prompts may be masked."""
    super().check(objective)
    check_prompts(self.name, self.prompt_rate, objective)

  def views(self, objective, process, batch):
    """Returns one view: the answer hidden, and a part of the prompt."""
    return mean_field(objective, batch, self.prompt_rate)

  def scores(self, objective, process, denoise, views, batch):
    """Returns log p of each token, nats."""
    terms = self.terms(
      objective, process, denoise, views, batch, guidance=self.guidance
    )
    return terms[:, 0]


def check_prompts(name: str, rate: float, objective) -> None:
  """Checks that prompts may be masked.

  Raises:
    ValueError: outputs are shifted: an answer's first token is read at the last
      slot of the prompt, which then may be masked.
  """
  if rate and objective.shift:
    raise ValueError(
      f"{name} masks prompts, which needs a network without shift:"
      f" {type(objective).__name__} with shift 1 reads an answer's first token"
      f" at the prompt's last slot; set {name}.prompt_rate to 0, or take"
      " coupled_grpo, espo or tracerl"
    )

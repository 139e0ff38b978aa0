r"""SPG: a lower bound for good answers, an upper one for bad (arXiv:2510.09541).

    lower = mean over views of the mean log p of masked tokens
    upper = 1/b mean over tokens of log q_i,
            q_i = mean over views of 1[i masked] p_i^b / t,  t the masked share
    score = lower if A > 0, else  omega upper + (1 - omega) lower
    L     = - sum A score n / sum n,   n the tokens of an answer

A plain policy gradient: no ratio, no clipping, no reference.
"""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dllm_jax.core import check
from dllm_jax.objectives.base import check_choice
from dllm_jax.posttraining.reinforcement.methods import surrogate
from dllm_jax.posttraining.reinforcement.methods.base import (
  fewest,
  Lost,
  masks,
  Method,
)
from dllm_jax.posttraining.reinforcement.methods.diffu_grpo import (
  check_prompts,
)
from dllm_jax.posttraining.reinforcement.rollouts import (
  Rollouts,
  row_keys,
  row_uniforms,
)

Masking = Literal["all", "random", "block_all", "block_random"]
Bound = Literal["mix", "elbo", "eubo", "zero"]


def lower_bound(
  log_p: Float[Array, "B n L"], scored: Bool[Array, "B n L"]
) -> Float[Array, "B"]:
  """Returns the mean over views of the mean log p of scored tokens, nats."""
  count = jnp.maximum(jnp.sum(scored, axis=2), 1)
  return jnp.mean(jnp.sum(log_p, axis=2) / count, axis=1)


def upper_bound(
  log_p: Float[Array, "B n L"],
  scored: Bool[Array, "B n L"],
  tokens: Bool[Array, "B L"],
  power: float,
) -> Float[Array, "B"]:
  """Returns 1/b times the mean of log q_i over tokens that a view masks, nats.

  Views in which a token is not masked count as zeros.
  """
  all_tokens = jnp.maximum(jnp.sum(tokens, axis=1), 1)[:, None]
  share = jnp.sum(scored, axis=2) / all_tokens
  share = jnp.where(share > 0, share, 1.0)
  # In logarithms: p^b of an unlikely token is no float32.
  each = power * log_p - jnp.log(share)[..., None]
  each = jnp.where(scored, each, -jnp.inf)
  found = jnp.any(scored, axis=1)
  # Guarded inputs: the gradient of logsumexp over nothing is not finite.
  safe = jnp.where(found[:, None], each, 0.0)
  log_q = jax.nn.logsumexp(safe, axis=1) - jnp.log(scored.shape[1])
  count = jnp.maximum(jnp.sum(found, axis=1), 1)
  return jnp.sum(jnp.where(found, log_q, 0.0), axis=1) / count / power


@dataclasses.dataclass(frozen=True, kw_only=True)
class SPG(Method):
  """Sandwiched policy gradient (Wang et al. 2025).

  Attributes:
    masking: the answer whole; a random share of it; a random block with all
      behind it; some tokens of such a block and all behind it.
    block_length: slots of those blocks, counted from the answer's start.
    samples: views of an answer (num_t).
    share_low: the least share that "random" masks,
    share_high: and the largest.
    prompt_rate: the probability that what is else visible is masked: of the
      prompt, and of blocks before the drawn one.
    bound: what bad answers are scored by; "zero" leaves them out.
    power: b of the upper bound; 1 to 2 by task.
    mix: omega.
  """

  iterations: int = 4
  masking: Masking = "block_random"
  block_length: int = 32
  samples: int = 2
  share_low: float = 0.0
  share_high: float = 1.0
  prompt_rate: float = 0.15
  bound: Bound = "mix"
  power: float = 1.5
  mix: float = 0.5

  name: ClassVar[str] = "spg"
  by_ratio: ClassVar[bool] = False

  def __post_init__(self):
    super().__post_init__()
    check.at_least(self, 1, "samples", "block_length", prefix="spg.")
    check.within("spg.prompt_rate", self.prompt_rate, "[0, 1)")
    check.within("spg.mix", self.mix, "[0, 1]")
    check_choice("spg.masking", self.masking, Masking)
    check_choice("spg.bound", self.bound, Bound)
    if self.beta:
      raise ValueError(f"spg has no reference: spg.beta is 0, not {self.beta}")
    if self.power <= 0:
      raise ValueError(f"spg.power must be above 0, not {self.power}")
    if not 0 <= self.share_low <= self.share_high <= 1:
      raise ValueError(
        "spg.share_low and spg.share_high must lie in [0, 1] in this order, not"
        f" {self.share_low} and {self.share_high}"
      )

  def check(self, objective) -> None:
    """Checks that prompts may be masked."""
    super().check(objective)
    check_prompts(self.name, self.prompt_rate, objective)

  def views(self, objective, process, batch):
    """Returns what is masked; what stands behind an answer always is."""
    hidden = self._answers(batch) & batch.loss_mask[:, None]
    if self.prompt_rate:
      # A stream of its own, beside that of the answers.
      u = row_uniforms(batch, self.samples + 1, *batch.tokens.shape[1:])[:, 1:]
      used = batch.segment_ids[:, None] > 0
      if self.masking in ("all", "random"):
        used &= ~batch.region[:, None]
      hidden |= used & (u < self.prompt_rate)
    tail = (batch.region & ~batch.loss_mask)[:, None]
    return masks(
      objective, batch, hidden | tail, hidden & batch.loss_mask[:, None]
    )

  def _answers(self, batch: Rollouts) -> Bool[Array, "B n L"]:
    """Returns what each view masks of answers."""
    keys = jax.vmap(lambda key: jax.random.split(key, 3))(row_keys(batch))
    length, n = batch.tokens.shape[1], self.samples
    tokens = jnp.sum(batch.loss_mask, axis=1)
    own = lambda i, *shape: jax.vmap(
      lambda key: jax.random.uniform(key, shape)
    )(keys[:, i])
    if self.masking == "all":
      return jnp.broadcast_to(batch.loss_mask[:, None], (len(keys), n, length))
    order = own(0, n, length)
    if self.masking == "random":
      low, high = self.share_low, self.share_high
      number = jnp.ceil((low + (high - low) * own(1, n)) * tokens[:, None])
      return fewest(order, batch.loss_mask[:, None], jnp.maximum(number, 1))
    size = self.block_length
    blocks = jnp.maximum(-(-tokens // size), 1)[:, None]
    drawn = _without_replacement(own(1, -(-length // size)), blocks, n)
    at = jnp.cumsum(batch.region, axis=1) - 1  # the slot's number in the answer
    block = (at // size)[:, None]
    inside = (block == drawn[..., None]) & batch.loss_mask[:, None]
    behind = (block > drawn[..., None]) & batch.loss_mask[:, None]
    if self.masking == "block_all":
      return inside | behind
    count = jnp.sum(inside, axis=2)
    number = 1 + jnp.floor(own(2, n) * count)
    return behind | fewest(order, inside, number)

  def scores(self, objective, process, denoise, views, batch):
    """Returns log p of each token in each view, `[B, L, n]`, nats."""
    terms = self.terms(objective, process, denoise, views, batch)
    return jnp.moveaxis(terms, 1, 2)

  def bounds(self, scores, views, batch) -> Float[Array, "B"]:
    """Returns the score of each answer, by the sign of its advantage."""
    log_p, scored = jnp.moveaxis(scores, 2, 1), views.weight != 0
    lower = lower_bound(log_p, scored)
    if self.bound == "elbo":
      return lower
    if self.bound == "zero":
      other = jnp.zeros_like(lower)
    else:
      other = upper_bound(log_p, scored, batch.loss_mask, self.power)
      if self.bound == "mix":
        other = self.mix * other + (1 - self.mix) * lower
    return jnp.where(batch.advantage[:, 0] > 0, lower, other)

  def loss(self, scores, views, batch) -> Lost:
    """Returns the loss. Metrics: `score`, the mean of answers, nats per token."""
    score = self.bounds(scores, views, batch)
    tokens = jnp.sum(batch.loss_mask, axis=1).astype(jnp.float32)
    return Lost(
      total=-jnp.sum(batch.advantage[:, 0] * score * tokens),
      weight=jnp.sum(tokens),
      metrics={"score": surrogate.mean(score, tokens > 0)},
    )


def _without_replacement(
  order: Float[Array, "B k"], blocks: Float[Array, "B 1"], n: int
) -> Float[Array, "B n"]:
  """Returns n blocks of each row's, again from the first when all were drawn."""
  order = jnp.where(jnp.arange(order.shape[1]) < blocks, order, 2.0)
  drawn = jnp.argsort(order, axis=1)
  return jnp.take_along_axis(drawn, jnp.arange(n) % blocks, axis=1)

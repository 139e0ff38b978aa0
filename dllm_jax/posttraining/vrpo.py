r"""VRPO: preferences by the difference of likelihood bounds (arXiv:2505.19223).

Direct preference optimisation in which log-likelihoods are estimated bounds:

    L = -log sigma( beta [(B_theta(y_w) - B_ref(y_w))
                          - (B_theta(y_l) - B_ref(y_l))] )

for the chosen answer y_w and the rejected one y_l of a prompt. The loss is not
linear in the estimates, so that their variance biases it. Three rules make it
small: many samples, each at a time of its own, and the same times and masks for
the policy and the reference. The two answers have their own.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dllm_jax.core import check
from dllm_jax.core.types import Denoise, Loss, Objective, Process
from dllm_jax.objectives.base import check_choice
from dllm_jax.posttraining import likelihood
from dllm_jax.posttraining.likelihood import Masks
from dllm_jax.posttraining.objective import InPlaceOf
from dllm_jax.posttraining.preferences import both, Pairs

Normalisation = Literal["sum", "tokens"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VRPO:
  """Variance-reduced preference optimisation (Zhu et al. 2025).

  Attributes:
    beta: how strongly a difference in nats counts; where it is divided by a
      constant length, as in DARE's port, that is a part of it.
    label_smoothing: the probability that a preference is the wrong way round,
      below 0.5.
    n_t: counts of hidden tokens, or times, in the estimate of an answer.
    n_yt: draws of hidden tokens for each of those; 1 has the least variance.
    estimator: "counts" hides exact numbers of tokens, "times" as many as a time
      makes it, see `likelihood`.
    normalisation: an estimate is the answer's log-likelihood ("sum") or its
      mean over the answer's tokens ("tokens").
    shared_noise: whether the reference is asked of what the policy is.
    noise_sets: how many different samples a pair has, one an epoch, then again
      from the first: the reference is asked of each once.
    sft_weight: factor, in the loss, of the chosen answer's estimated nats per
      token.
  """

  beta: float = 0.1
  label_smoothing: float = 0.0
  n_t: int = 8
  n_yt: int = 1
  estimator: likelihood.Estimator = "counts"
  normalisation: Normalisation = "sum"
  shared_noise: bool = True
  noise_sets: int = 4
  sft_weight: float = 0.0

  def __post_init__(self):
    check.at_least(self, 1, "n_t", "n_yt", "noise_sets", prefix="vrpo.")
    check.at_least(self, 0, "sft_weight", prefix="vrpo.")
    check.within("vrpo.label_smoothing", self.label_smoothing, "[0, 0.5)")
    if self.beta <= 0.0:
      raise ValueError(f"vrpo.beta must be above 0, not {self.beta}")
    check_choice("vrpo.estimator", self.estimator, likelihood.Estimator)
    check_choice("vrpo.normalisation", self.normalisation, Normalisation)

  @property
  def samples(self) -> int:
    """Samples of an answer (n = n_t n_yt)."""
    return self.n_t * self.n_yt

  def masks(
    self,
    objective: Objective,
    process: Process,
    seed: int,
    batch: Pairs,
    *,
    reference: bool = False,
  ) -> Masks:
    """Returns what is hidden of each answer, leaves `[B, 2, n, L]`.

    A function of the seed, the pair's number and its noise's: the same in
    whatever batch, so that the reference need be asked once.

    Args:
      objective: how rows are corrupted.
      process: its arrays.
      seed: any.
      batch: the pairs.
      reference: whether the reference is to be asked, not the policy.
    """
    own = reference and not self.shared_noise

    def key(number, noise):
      key = jax.random.fold_in(jax.random.key(seed), number)
      key = jax.random.fold_in(key, noise)
      return jax.random.split(jax.random.fold_in(key, own))

    keys = jax.vmap(key)(batch.number, batch.noise).reshape(-1)
    masks = likelihood.draw_masks(
      objective,
      process,
      keys,
      both(batch),
      n_t=self.n_t,
      n_yt=self.n_yt,
      estimator=self.estimator,
    )
    return jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), masks)

  def terms(
    self,
    objective: Objective,
    process: Process,
    denoise: Denoise,
    masks: Masks,
    batch: Pairs,
  ) -> Float[Array, "B 2 n L"]:
    """Returns `likelihood.log_terms` of both answers."""
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), masks)
    terms = likelihood.log_terms(objective, process, denoise, flat, both(batch))
    return terms.reshape(-1, 2, *terms.shape[1:])

  def scores(
    self, gain: Float[Array, "B 2 n"], tokens: Float[Array, "B 2"]
  ) -> Float[Array, "B n"]:
    """Returns samples of beta [(B_theta - B_ref)(y_w) - (B_theta - B_ref)(y_l)].

    Args:
      gain: samples of B_theta - B_ref, nats.
      tokens: how many each answer has.
    """
    if self.normalisation == "tokens":
      gain = gain / tokens[..., None]
    return self.beta * (gain[:, 0] - gain[:, 1])

  def pair_losses(self, score: Float[Array, "B"]) -> Float[Array, "B"]:
    """Returns the loss of each pair, nats.

    `-(1 - eps) log sigma(s) - eps log sigma(-s)`, eps the label smoothing.
    """
    wrong = self.label_smoothing
    agree, differ = jax.nn.log_sigmoid(score), jax.nn.log_sigmoid(-score)
    return -(1.0 - wrong) * agree - wrong * differ


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference(InPlaceOf):
  """The loss of the method.

  Attributes:
    method: how it is aligned.
    seed: of the masks.
  """

  method: VRPO
  seed: int

  def __post_init__(self):
    likelihood.check_objective(self.objective)

  def draw(
    self,
    process: Process,
    key: Key[Array, ""],
    batch: Pairs,
    *,
    step: Int[Array, ""],
  ) -> Masks:
    """Returns what is hidden, by the numbers of pairs and not by the step."""
    return self.method.masks(self.objective, process, self.seed, batch)

  def loss(
    self,
    process: Process,
    denoise: Denoise,
    drawn: Masks,
    batch: Pairs,
    *,
    step: Int[Array, ""],
  ) -> Loss:
    """Returns the summed loss of pairs, nats, and how far answers are apart.

    The bound is that of chosen answers. Metrics: `accuracy`, the share of pairs
    whose score is above 0; `score`, its mean; `score_variance`, of the estimate
    of a score, as samples at random times would have it: from how they differ;
    `chosen_gain` and `rejected_gain`, B_theta - B_ref, nats.
    """
    method = self.method
    terms = method.terms(self.objective, process, denoise, drawn, batch)
    gain = jnp.sum(terms, axis=-1) - batch.reference
    tokens = _tokens(batch)
    scores = method.scores(gain, tokens)
    score = jnp.mean(scores, axis=-1)
    losses = method.pair_losses(score)
    chosen = -jnp.mean(terms[:, 0], axis=1)
    if method.sft_weight:
      nats = jnp.sum(chosen, axis=-1) / tokens[:, 0]
      losses += method.sft_weight * nats
    gains = jnp.mean(gain, axis=(0, 2))
    metrics = {
      "accuracy": accuracy(score),
      "score": jnp.mean(score),
      "chosen_gain": gains[0],
      "rejected_gain": gains[1],
    }
    if method.samples > 1:
      spread = jnp.var(scores, axis=-1, ddof=1) / method.samples
      metrics["score_variance"] = jnp.mean(spread)
    return Loss(
      total=jnp.sum(losses),
      weight=jnp.float32(losses.shape[0]),
      bound=jax.lax.stop_gradient(chosen),
      metrics=metrics,
    )


def accuracy(score: Float[Array, "B"]) -> Float[Array, ""]:
  """Returns the share of pairs whose score is above 0; half of those at 0."""
  return ((score > 0.0) + 0.5 * (score == 0.0)).mean()


def _tokens(batch: Pairs) -> Float[Array, "B 2"]:
  """Returns the tokens of each answer."""
  masks = jnp.stack([batch.loss_mask, batch.rejected.loss_mask], axis=1)
  return jnp.maximum(jnp.sum(masks, axis=-1), 1).astype(jnp.float32)

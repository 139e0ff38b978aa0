r"""SEDD: score entropy discrete diffusion (arXiv:2310.16834).

The network gives log s_y, the log of the ratio p_t(z with y) / p_t(z) at one
position. On the absorbing graph tokens are masked, on the uniform graph they jump
to any of V tokens at rate 1 / V; in both alpha(t) = exp(-sigma(t)) are kept. The
loss is sigma'(t) times the score entropy (eq. 5),

    sum_{y != z} Q(y, z) [ s_y - r_y log s_y + r_y (log r_y - 1) ],

r_y the true ratio given x0, taken in closed form on each graph.
"""

import dataclasses
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.core.schedule import LogLinear, Schedule, SCHEDULES
from dllm_jax.core.time import TimeRule
from dllm_jax.objectives.base import check_choice, TokenSpace
from dllm_jax.objectives.continuous import ContinuousMixture
from dllm_jax.objectives.mixture import (
  finite_log,
  likelihood,
  normalised,
  Parts,
  safe_log,
  vocabulary_without_mask,
)

Graph = Literal["absorbing", "uniform"]
Predictor = Literal["euler", "analytic", "denoiser"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SEDD(ContinuousMixture):
  """Score entropy discrete diffusion (Lou et al. 2024).

  Attributes:
    schedule: the noise sigma(t), finite at 1.
    graph: what noise does: "absorbing" masks, "uniform" replaces.
    scale_by_sigma: subtracts log expm1(sigma) + log(V - 1) from the network's
      output, so that it starts near the right size; absorbing graph only.
    predictor: the reverse step. "euler": z_s ~ one(z) + (t - s) sigma' rate;
      "analytic": Tweedie's tau-leaping, which undoes sigma(t) - sigma(s) exactly
      (eq. 19); "denoiser": through p(x0 | z_t). The last step, to time 0, is
      always the denoiser's.

  Examples:
    >>> import jax.numpy as jnp
    >>> sedd = SEDD(vocab_size=5, mask_id=4)
    >>> round(float(sedd.parts(jnp.float32(1.0)).keep), 4)  # exp(-sigma(1))
    0.001
    >>> uniform = SEDD(vocab_size=4, graph="uniform", scale_by_sigma=False)
  """

  schedule: Schedule = dataclasses.field(
    default=LogLinear(), metadata={"choices": SCHEDULES}
  )
  graph: Graph = "absorbing"
  scale_by_sigma: bool = True
  predictor: Predictor = "analytic"
  time_rule: TimeRule = "independent"

  def __post_init__(self):
    super().__post_init__()
    check_choice("graph", self.graph, Graph)
    check_choice("predictor", self.predictor, Predictor)
    absorbing = self.graph == "absorbing"
    if absorbing and self.mask_id is None:
      raise ValueError("SEDD's absorbing graph needs a mask_id")
    if not absorbing and self.mask_id is not None:
      raise ValueError(
        f"SEDD's uniform graph has no mask: mask_id {self.mask_id} may not lie "
        f"inside its vocabulary of {self.vocab_size}; leave mask_id out"
      )
    if not absorbing and self.scale_by_sigma:
      raise ValueError(
        "scale_by_sigma is for the absorbing graph; set it to False"
      )
    if getattr(self.schedule, "floor", 1.0) <= 0.0:
      raise ValueError(
        "SEDD needs a finite sigma(1): take loglinear, geometric or "
        f"sigma_linear, or a floor above 0, not {self.schedule}"
      )

  @classmethod
  def over(cls, space: TokenSpace, **fields: Any) -> Self:
    """Returns the objective over a token space, with a mask if it masks."""
    if fields.get("graph", "absorbing") == "absorbing":
      return super().over(space, **fields)
    fields = {"scale_by_sigma": False} | fields
    return cls(vocab_size=vocabulary_without_mask(space, "SEDD"), **fields)

  @property
  def absorbing(self) -> bool:
    """Whether a masked token stays masked."""
    return self.graph == "absorbing"

  @property
  def replaces(self) -> bool:
    """Whether noise replaces tokens."""
    return not self.absorbing

  def conditioning(self, t: Float[Array, "B #T"]) -> Array | None:
    """Returns sigma(t) if the network is told the time."""
    return self.schedule.told(t) if self.time_conditioning else None

  def parts(self, t: Float[Array, "*n"]) -> Parts:
    """Returns the fate of a token: kept, or masked or replaced."""
    lost = self.schedule.masked(t)
    none = jnp.zeros_like(lost)
    if self.absorbing:
      return Parts(1.0 - lost, none, lost)
    return Parts(1.0 - lost, lost, none)

  def prior_loss(self) -> Float[Array, ""]:
    """Returns the prior's term; 0 on the absorbing graph, as in the original.

    There a prior of masks alone cannot cover the alpha(1) of tokens left.
    """
    return jnp.zeros(()) if self.absorbing else super().prior_loss()

  def log_score(
    self,
    logits: Float[Array, "B c V"],
    z: Int[Array, "B c"],
    t: Float[Array, "B #c"],
  ) -> Float[Array, "B c V"]:
    """Returns log s of every token, 0 at z."""
    if self.scale_by_sigma:
      scale = jnp.log(jnp.expm1(self.schedule.sigma(t)))
      logits = logits - scale[..., None] - jnp.log(self.vocab_size - 1.0)
    return jnp.where(jnp.arange(self.vocab_size) == z[..., None], 0.0, logits)

  def score_entropy(
    self,
    log_score: Float[Array, "B c V"],
    x0: Int[Array, "B c"],
    z: Int[Array, "B c"],
    t: Float[Array, "B #c"],
  ) -> Float[Array, "B c"]:
    """Returns the score entropy of each position; the weight sigma' is not in."""
    sigma = self.schedule.sigma(t)
    grown = jnp.expm1(sigma)
    at_x0 = jnp.take_along_axis(log_score, x0[..., None], axis=-1)[..., 0]
    if self.absorbing:
      other = jnp.arange(self.vocab_size) != self.mask_id
      positive = jnp.sum(jnp.where(other, jnp.exp(log_score), 0.0), axis=-1)
      ratio = 1.0 / grown
      term = positive - ratio * at_x0 - ratio * (jnp.log(grown) + 1.0)
      return jnp.where(z == self.mask_id, term, 0.0)
    n = self.vocab_size
    # The token z itself has log s = 0 and s = 1: out of both means.
    positive = (jnp.sum(jnp.exp(log_score), axis=-1) - 1.0) / n
    mean = jnp.sum(log_score, axis=-1) / n
    ratio = grown / (grown + n)  # 1 - n / (grown + n)
    log_ratio = jnp.log(ratio)
    same = (n - 1) / n * ratio * (log_ratio - 1.0) - ratio * mean
    moved = ((-log_ratio - 1.0) / ratio - (n - 2)) / n - mean - at_x0 / grown
    return positive + jnp.where(x0 == z, same, moved)

  def token_loss(self, process, logits, x0, z, t) -> Float[Array, "B c"]:
    """Returns sigma'(t) times the score entropy, in nats per token."""
    log_score = self.log_score(logits, z, t)
    return self.schedule.dsigma(t) * self.score_entropy(log_score, x0, z, t)

  def log_x0(self, process, logits, z, t) -> Float[Array, "B c V"]:
    """Returns log p(x0 | z_t): all noise undone at once, no mask left."""
    p = self._undone(self.log_score(logits, z, t), z, self.schedule.sigma(t))
    if self.mask_id is not None:
      p = jnp.where(jnp.arange(self.vocab_size) == self.mask_id, 0.0, p)
    return _normalised(p)

  def posterior(self, process, logits, z, t, s) -> Float[Array, "B c V"]:
    """Returns log p(z_s | z_t) of the predictor; the denoiser's at s = 0."""
    clean = self.log_x0(process, logits, z, t)
    if self.predictor == "denoiser":
      step = self._through_x0(clean, z, self.parts(t), self.parts(s))
    else:
      log_score = self.log_score(logits, z, t)
      if self.predictor == "euler":
        p = self._euler(log_score, z, (t - s) * self.schedule.dsigma(t))
      else:
        change = self.schedule.sigma(t) - self.schedule.sigma(s)
        p = self._undone(log_score, z, change)
      step = _normalised(p)
    return jnp.where((s <= 0)[..., None], clean, step)

  def _through_x0(self, log_p, z, t, s):
    """Returns log sum_x0 q(z_s | z_t, x0) p(x0 | z_t).

    `reversed` wants x0 given the other tokens: q(z | x0) is divided out.
    """
    seen = likelihood(
      t, z, self.vocab_size, self.mask_id, absorbing=self.absorbing
    )
    others = normalised(log_p - finite_log(seen), z)
    return self.reversed(others, z, t, s)

  def _euler(self, log_score, z, amount):
    """Returns one(z) + amount * (reverse rate at z)."""
    here = jnp.arange(self.vocab_size) == z[..., None]
    if self.absorbing:
      rate = jnp.where((z == self.mask_id)[..., None], jnp.exp(log_score), 0.0)
    else:
      rate = jnp.exp(log_score) / self.vocab_size
    moved = jnp.where(here, 0.0, amount[..., None] * rate)
    stay = 1.0 - jnp.sum(moved, axis=-1, keepdims=True)
    return jnp.where(here, stay, moved)

  def _undone(self, log_score, z, change):
    """Returns (exp(-change Q) s)_y q(z | y), sigma lowered by `change`."""
    score, here = (
      jnp.exp(log_score),
      jnp.arange(self.vocab_size) == z[..., None],
    )
    if self.absorbing:
      moved = jnp.where(here, 0.0, jnp.expm1(change)[..., None] * score)
      stay = 1.0 - jnp.sum(moved, axis=-1, keepdims=True)
      masked = (z == self.mask_id)[..., None]
      return jnp.where(masked, jnp.where(here, stay, moved), 1.0 * here)
    lost = -jnp.expm1(-change)[..., None] / self.vocab_size
    score -= lost * jnp.sum(score, axis=-1, keepdims=True)
    return score * (jnp.where(here, jnp.exp(-change)[..., None], 0.0) + lost)


def _normalised(p: Float[Array, "*n V"]) -> Float[Array, "*n V"]:
  """Returns log p, normalised; a negative probability (a long step) is 0."""
  return jax.nn.log_softmax(safe_log(p))

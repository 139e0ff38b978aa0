r"""UDLM: uniform-state diffusion (arXiv:2412.10193) and Duo's form of its bound.

Each token is kept with probability alpha(t) and else replaced by a uniform one;
there is no mask, and every token may change until the end. With N tokens,
xb = N alpha one(x0) + 1 - alpha and xb' = N alpha p_theta + 1 - alpha, the
continuous-time bound (eq. 18) has the integrand

    alpha' / (N alpha) [ N / xb_z - N / xb'_z
        - sum_j (xb_j / xb_z) log( xb'_z xb_j / (xb'_j xb_z) ) ].

Duo (arXiv:2506.10892) takes the sum over j in closed form wherever xb_j does not
depend on the network ("Rao-Blackwellised"): equal in value, cheaper in memory.
At the optimum p_theta at a position is x0 given the other positions' tokens: what
z itself says enters through q(z_t | z_s).
"""

import dataclasses
from typing import Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.core.schedule import LogLinear, Schedule, SCHEDULES
from dllm_jax.core.types import Loss
from dllm_jax.core.vocabulary import cross_entropy
from dllm_jax.objectives.base import check_choice, TokenSpace
from dllm_jax.objectives.continuous import ContinuousMixture
from dllm_jax.objectives.mixture import (
  between,
  Parts,
  step_divergence,
  vocabulary_without_mask,
)

Form = Literal["direct", "rao_blackwell"]
Reconstruction = Literal["copied", "network"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class UDLM(ContinuousMixture):
  """Uniform-state diffusion language modelling (Schiff et al. 2024).

  Attributes:
    schedule: alpha(t), the probability that a token is kept; alpha(0) = 1.
    form: "direct" sums over the vocabulary as UDLM writes it; "rao_blackwell" is
      Duo's form. Both are the same number.
    steps: None for continuous time, or the number of steps T of a discrete
      process, whose bound is T times a KL between posteriors.
    reconstruction: "copied" where the last step copies the clean token
      (alpha(0) = 1: the term is 0), "network" for the cross-entropy of a second
      network call at t = 0, as UDLM's code adds unless told otherwise.

  Examples:
    >>> import jax.numpy as jnp
    >>> udlm = UDLM(vocab_size=4)  # no mask
    >>> round(float(udlm.parts(jnp.float32(1.0)).uniform), 4)
    0.999
  """

  schedule: Schedule = dataclasses.field(
    default=LogLinear(), metadata={"choices": SCHEDULES}
  )
  form: Form = "rao_blackwell"
  steps: int | None = None
  reconstruction: Reconstruction = "copied"

  def __post_init__(self):
    super().__post_init__()
    if self.mask_id is not None:
      raise ValueError(
        f"UDLM replaces tokens by uniform ones: mask_id {self.mask_id} may not "
        f"lie inside its vocabulary of {self.vocab_size}; leave mask_id out"
      )
    if getattr(self.schedule, "ceiling", 0.0) != 1.0:
      raise ValueError(
        "UDLM needs a schedule with alpha(0) = 1 (linear, loglinear, cosine, "
        "cosine_squared, sine or polynomial, ceiling 1), not "
        f"{self.schedule}"
      )
    if self.steps is not None and self.steps < 1:
      raise ValueError(f"steps must be at least 1 or None, not {self.steps}")
    check_choice("form", self.form, Form)
    check_choice("reconstruction", self.reconstruction, Reconstruction)

  @classmethod
  def over(cls, space: TokenSpace, **fields) -> Self:
    """Returns the objective over a token space, its mask left out."""
    return cls(vocab_size=vocabulary_without_mask(space, "UDLM"), **fields)

  def conditioning(self, t: Float[Array, "B #T"]) -> Array | None:
    """Returns sigma(t) if the network is told the time."""
    return self.schedule.told(t) if self.time_conditioning else None

  def parts(self, t: Float[Array, "*n"]) -> Parts:
    """Returns the fate of a token: kept or replaced."""
    lost = self.schedule.masked(t)
    return Parts(1.0 - lost, lost, jnp.zeros_like(lost))

  def time(self, key, shape) -> Float[Array, "B 1"]:
    """Returns one time a row; of T steps, (floor(t T) + 1) / T."""
    t = super().time(key, shape)
    if self.steps is None:
      return t
    return (jnp.floor(t * self.steps) + 1.0) / self.steps

  def token_loss(self, process, logits, x0, z, t) -> Float[Array, "B c"]:
    """Returns the integrand of the bound, in nats per token."""
    if self.steps is not None:
      return self._step_loss(process, logits, x0, z, t)
    n, alpha = self.vocab_size, self.schedule.alpha(t)
    scale = self.schedule.dalpha(t) / (n * alpha)
    rest = self.schedule.masked(t)  # 1 - alpha
    p = jax.nn.softmax(logits)
    log_bar = jnp.log(n * alpha[..., None] * p + rest[..., None])
    log_z = _take(log_bar, z)
    same = x0 == z
    bar_z = jnp.where(same, n * alpha, 0.0) + rest
    first = n / bar_z - n * jnp.exp(-log_z)
    if self.form == "direct":
      here = jnp.arange(n) == x0[..., None]
      bar = jnp.where(here, n * alpha[..., None], 0.0) + rest[..., None]
      ratio = bar / bar_z[..., None]
      second = ratio * (log_z[..., None] - log_bar + jnp.log(ratio))
      return scale * (first - jnp.sum(second, axis=-1))
    c = rest / (n * alpha + rest)
    spread = jnp.sum(log_bar, axis=-1) - n * log_z
    second = jnp.where(same, c, 1.0) * spread
    gap = n * alpha / rest * (_take(log_bar, x0) - log_z)
    second += jnp.where(same, 0.0, gap)
    constant = jnp.where(same, (n - 1) * c, -1.0 / c) * jnp.log(c)
    return scale * (first + second - constant)

  def _step_loss(self, process, logits, x0, z, t):
    """Returns T KL(q(z_s | z_t, x0) || p_theta(z_s | z_t)), s = t - 1/T."""
    early = self.parts(t - 1.0 / self.steps)
    jump = between(early, self.parts(t), absorbing=False)
    guess = self.log_x0(process, logits, z, t)
    return self.steps * step_divergence(early, jump, x0, z, guess, None)

  def loss(self, process, denoise, drawn, batch, *, step) -> Loss:
    """Returns the loss, with the reconstruction term if it is asked for."""
    loss = super().loss(process, denoise, drawn, batch, step=step)
    if self.reconstruction == "copied":
      return loss
    inputs = self.inputs(process, batch.tokens, jnp.zeros_like(drawn.t), batch)
    weights = self.weigh(process, None, None, None, batch)
    row = 1.0 if batch.loss_weight is None else batch.loss_weight[:, None]
    total, terms = cross_entropy(
      denoise(inputs), batch.tokens, weights.loss * row
    )
    return loss.replace(
      total=loss.total + total, bound=loss.bound + weights.bound * terms
    )


def _take(x: Float[Array, "B c V"], at: Int[Array, "B c"]):
  return jnp.take_along_axis(x, at[..., None], axis=-1)[..., 0]

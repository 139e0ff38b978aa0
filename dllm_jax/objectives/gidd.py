r"""GIDD: tokens are masked and replaced at once (arXiv:2503.04482).

q(z_t | x0) = alpha one(x0) + (1 - alpha) pi_t, with pi_t a mix of the mask and of
uniform tokens that changes with time. A network that sees replaced tokens among
masks learns to correct its own. With q and p the marginals given x0 and given the
network's x0, the continuous-time bound (eq. 9) has the integrand

    w(z) [ KL(q || p) + q_z / p_z - log(q_z / p_z) - 1 ],
    w(z) = ( d/dt[(1 - alpha) pi] - alpha'/alpha (1 - alpha) pi )_z / q_z.

Without uniform noise it is MDLM's, without the mask UDLM's.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.core.schedule import Linear, Schedule, SCHEDULES
from dllm_jax.core.types import Process
from dllm_jax.core.vocabulary import reduce
from dllm_jax.objectives.continuous import ContinuousMixture
from dllm_jax.objectives.mixture import (
  finite_log,
  log_tokens,
  noise_at,
  Parts,
  real_tokens,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bump:
  r"""Uniform noise in the middle of time (arXiv:2503.04482, eq. 13).

  With c(t) = B t^(g/2) (1 - t)^(g/2), alpha = (1 - t) / (1 + c), mask
  t / (1 + c), uniform c / (1 + c); B makes the uniform share of t = 1/2 be
  `uniform`. All masks at t = 1.

  Attributes:
    uniform: the part of tokens that are replaced at t = 1/2 (p_u).
    power: g.
  """

  uniform: float = 0.1
  power: float = 1.0

  def __post_init__(self):
    if not 0.0 <= self.uniform < 1.0 or self.power <= 0:
      raise ValueError(
        "GIDD's bump needs 0 <= uniform < 1 and power > 0, not "
        f"{self.uniform} and {self.power}"
      )

  def parts(self, t: Float[Array, "*n"]) -> Parts:
    """Returns the fate of a token at time t."""
    height = 2.0**self.power * self.uniform / (1.0 - self.uniform)
    bump = jnp.maximum(t * (1.0 - t), 0.0)
    bump = jnp.where(bump > 0, bump, 1.0) ** (self.power / 2) * (bump > 0)
    c = height * bump
    return Parts((1.0 - t) / (1.0 + c), c / (1.0 + c), t / (1.0 + c))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sigmoid:
  r"""Noise is uniform with probability sigmoid(slope l + offset).

  l = log(alpha / (1 - alpha)): with slope 1 the last noise before clean text is
  uniform, the first is masks; slope 0 is a constant share.

  Attributes:
    schedule: alpha(t).
    slope: a.
    offset: b; -inf for masks alone, inf for uniform noise alone.
  """

  schedule: Schedule = dataclasses.field(
    default=Linear(), metadata={"choices": SCHEDULES}
  )
  slope: float = 1.0
  offset: float = 0.0

  def parts(self, t: Float[Array, "*n"]) -> Parts:
    """Returns the fate of a token at time t."""
    lost = self.schedule.masked(t)
    # Clipped so that the derivative at the ends of time is finite.
    inside = jnp.clip(lost, 1e-7, 1.0 - 1e-7)
    ratio = jnp.log1p(-inside) - jnp.log(inside)
    share = jax.nn.sigmoid(self.slope * ratio + self.offset)
    return Parts(1.0 - lost, lost * share, lost * (1.0 - share))


NOISES = {"bump": Bump, "sigmoid": Sigmoid}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GIDD(ContinuousMixture):
  """Generalised interpolating discrete diffusion (von Ruette et al. 2025).

  Attributes:
    noise: alpha(t), and the mix of mask and uniform, over time.
    weight_clip: the largest weight w in the training loss, or None for the bound
      itself. The bound that is reported is never clipped.
    time_epsilon: training times lie in [eps, 1 - eps].

  Examples:
    >>> import jax.numpy as jnp
    >>> gidd = GIDD(vocab_size=5, mask_id=4, noise=Bump(uniform=0.1))
    >>> [round(float(x), 3) for x in gidd.parts(jnp.float32(0.5))]
    [0.45, 0.1, 0.45]
  """

  noise: Bump | Sigmoid = dataclasses.field(
    default=Bump(), metadata={"choices": NOISES}
  )
  weight_clip: float | None = None
  time_epsilon: float = 1e-4

  def __post_init__(self):
    super().__post_init__()
    if self.mask_id is None:
      raise ValueError("GIDD needs a mask_id")
    if not isinstance(self.noise, tuple(NOISES.values())):
      raise ValueError(
        f"GIDD does not support the noise {self.noise!r}; legal: "
        f"{', '.join(NOISES)}"
      )
    if self.weight_clip is not None and self.weight_clip <= 0:
      raise ValueError(
        f"weight_clip must be above 0 or None, not {self.weight_clip}"
      )

  def parts(self, t: Float[Array, "*n"]) -> Parts:
    """Returns the fate of a token at time t."""
    return self.noise.parts(t)

  def conditioning(self, t: Float[Array, "B #T"]) -> Array | None:
    """Returns 1000 t if the network is told the time."""
    return 1000.0 * t if self.time_conditioning else None

  def time(self, key, shape) -> Float[Array, "B 1"]:
    """Returns one time a row, in [eps, 1 - eps]."""
    return jnp.minimum(super().time(key, shape), 1.0 - self.time_epsilon)

  def weight(
    self,
    x0: Int[Array, "B c"],
    z: Int[Array, "B c"],
    t: Float[Array, "B #c"],
  ) -> Float[Array, "B c"]:
    """Returns w(z), the rate of noise into z over q(z | x0)."""
    now, change = jax.jvp(self.parts, (t,), (jnp.ones_like(t),))
    noise = noise_at(now, z, self.vocab_size, self.mask_id)
    rate = noise_at(change, z, self.vocab_size, self.mask_id)
    rate -= change.keep / now.keep * noise
    q_z = noise + jnp.where(x0 == z, now.keep, 0.0)
    # An unmasked token without uniform noise has rate 0, and q may be 0.
    return jnp.where(rate > 0, rate, 0.0) / jnp.where(q_z > 0, q_z, 1.0)

  def gap(
    self,
    process: Process,
    logits: Float[Array, "B c V"],
    x0: Int[Array, "B c"],
    z: Int[Array, "B c"],
    t: Float[Array, "B #c"],
  ) -> Float[Array, "B c"]:
    """Returns KL(q || p) + q_z / p_z - log(q_z / p_z) - 1, in nats."""
    now = self.parts(t)
    n = real_tokens(self.vocab_size, self.mask_id)
    each = now.uniform / n
    guess = self.log_x0(process, logits, z, t)
    log_p, log_sum = log_tokens(now, guess, self.mask_id)
    take = lambda at: jnp.take_along_axis(log_p, at[..., None], -1)[..., 0]
    masked = z == self.mask_id
    at_x0, at_z = take(x0), take(jnp.where(masked, x0, z))
    copied = now.keep + each
    own = (n - 1) * each * finite_log(each) + copied * finite_log(copied)
    divergence = own - each * log_sum - now.keep * at_x0
    # The mask's share is the same under both: q_z / p_z = 1 there.
    q_z = each + jnp.where(x0 == z, now.keep, 0.0)
    log_ratio = jnp.where(masked, 0.0, finite_log(q_z) - at_z)
    return divergence + jnp.expm1(log_ratio) - log_ratio

  def token_loss(self, process, logits, x0, z, t) -> Float[Array, "B c"]:
    """Returns the integrand of the bound, in nats per token."""
    return self.weight(x0, z, t) * self.gap(process, logits, x0, z, t)

  def score(
    self, process, out, x0, z, t, weights
  ) -> tuple[Float[Array, ""], Float[Array, "B L"]]:
    """Returns the summed loss, its weight clipped, and the bound."""

    def gap(logits, x0, z, t):
      return self.gap(process, logits, x0, z, t)

    gap, weight = reduce(gap, out, x0, z, t, live=2), self.weight(x0, z, t)
    bound = weight * jax.lax.stop_gradient(gap) + self.prior_loss()
    if self.weight_clip is not None:
      weight = jnp.minimum(weight, self.weight_clip)
    return jnp.sum(weights.loss * weight * gap), weights.bound * bound

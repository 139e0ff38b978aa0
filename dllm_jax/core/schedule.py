r"""Noise schedules: the probability alpha(t) that a token is kept at time t.

alpha falls from (nearly) 1 at t = 0 to (nearly) 0 at t = 1. Masked diffusion
needs alpha, its derivative, and 1 - alpha without cancellation; SEDD speaks of
sigma = -log alpha. Rules that draw training times are in `time.py`.

Every schedule computes in float32 (or float64 where its input is).
"""

import abc
import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

Times = Float[Array, "*n"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule(abc.ABC):
  r"""alpha(t) = floor + (ceiling - floor) (1 - f(t)) for a curve f from 0 to 1.

  Subclasses give `curve` and `slope` (f and f'). MDLM keeps `ceiling` 1 and lets
  `floor` be its eps; MD4 clips both ends (floor eps, ceiling 1 - eps).

  Attributes:
    floor: alpha(1), a probability.
    ceiling: alpha(0), a probability.
  """

  floor: float = 0.0
  ceiling: float = 1.0

  def __post_init__(self):
    if not 0.0 <= self.floor < self.ceiling <= 1.0:
      raise ValueError(
        "a schedule needs 0 <= floor < ceiling <= 1, not floor "
        f"{self.floor} and ceiling {self.ceiling}"
      )

  @abc.abstractmethod
  def curve(self, t: Times) -> Times:
    """Returns f(t), rising from 0 to 1."""

  @abc.abstractmethod
  def slope(self, t: Times) -> Times:
    """Returns f'(t)."""

  def alpha(self, t: Times) -> Times:
    """Returns the probability that a token is still clean at time t."""
    return 1.0 - self.masked(t)

  def dalpha(self, t: Times) -> Times:
    """Returns alpha'(t), at most 0."""
    return -(self.ceiling - self.floor) * self.slope(t)

  def masked(self, t: Times) -> Times:
    """Returns 1 - alpha(t) without cancellation at small t."""
    return (1.0 - self.ceiling) + (self.ceiling - self.floor) * self.curve(t)

  def sigma(self, t: Times) -> Times:
    """Returns the total noise sigma(t) = -log alpha(t)."""
    return -jnp.log1p(-self.masked(t))

  def told(self, t: Times) -> Times:
    """Returns sigma(t) as networks are told it: a number at every time.

    Where alpha reaches 0, sigma has no bound; networks are told at most that of
    MDLM's floor, -log 1e-3, as by the code of BD3-LM (arXiv:2503.09573).
    """
    most = -math.log(self.floor or LogLinear.floor)
    return jnp.minimum(self.sigma(t), most)

  def dsigma(self, t: Times) -> Times:
    """Returns the noise rate sigma'(t) = -alpha'(t) / alpha(t)."""
    return -self.dalpha(t) / self.alpha(t)

  def weight(self, t: Times) -> Times:
    r"""Returns -alpha'(t) / (1 - alpha(t)) = sigma' / expm1(sigma).

    The weight of a masked token's cross-entropy in the continuous-time bound
    (arXiv:2406.07524, eq. 10; arXiv:2406.04329, eq. 5); 1/t for `Linear()`.
    """
    return -self.dalpha(t) / self.masked(t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Polynomial(Schedule):
  r"""f(t) = t^power (arXiv:2406.04329, table 1).

  Attributes:
    power: the exponent, above 0.

  Examples:
    >>> float(Polynomial(power=2.0).alpha(0.5))
    0.75
  """

  power: float = 2.0

  def __post_init__(self):
    super().__post_init__()
    if self.power <= 0:
      raise ValueError(f"power must be above 0, not {self.power}")

  def curve(self, t: Times) -> Times:
    """Returns f(t)."""
    return t**self.power

  def slope(self, t: Times) -> Times:
    """Returns f'(t)."""
    return self.power * t ** (self.power - 1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
  """f(t) = t: alpha falls linearly; MD4's and LLaDA's "linear".

  Examples:
    >>> linear = Linear()
    >>> float(linear.alpha(0.25)), float(linear.weight(0.25))
    (0.75, 4.0)
  """

  def curve(self, t: Times) -> Times:
    """Returns f(t)."""
    return t

  def slope(self, t: Times) -> Times:
    """Returns f'(t)."""
    return jnp.ones_like(t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogLinear(Linear):
  r"""sigma(t) = -log1p(-(1 - floor) t), the log-linear noise of SEDD and MDLM.

  The same curve as `Linear` with MDLM's floor of 1e-3: alpha(1) stays above 0,
  so that sigma(1) is finite.

  Examples:
    >>> import jax.numpy as jnp
    >>> round(float(LogLinear().alpha(jnp.float32(1.0))), 4)
    0.001
  """

  floor: float = 1e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
  r"""alpha(t) = cos(pi t / 2) before clipping (arXiv:2406.07524, app. E.1).

  Examples:
    >>> import jax.numpy as jnp
    >>> round(float(Cosine().alpha(jnp.float32(0.5))), 4)  # cos(pi / 4)
    0.7071
  """

  def curve(self, t: Times) -> Times:
    """Returns f(t)."""
    # 1 - cos x = 2 sin^2(x / 2) does not cancel at small t.
    return 2.0 * jnp.sin(math.pi / 4.0 * t) ** 2

  def slope(self, t: Times) -> Times:
    """Returns f'(t)."""
    return math.pi / 2.0 * jnp.sin(math.pi / 2.0 * t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineSquared(Schedule):
  r"""alpha(t) = cos^2(pi t / 2) before clipping (arXiv:2406.07524, app. E.1).

  Examples:
    >>> import jax.numpy as jnp
    >>> round(float(CosineSquared().alpha(jnp.float32(0.5))), 4)
    0.5
  """

  def curve(self, t: Times) -> Times:
    """Returns f(t)."""
    return jnp.sin(math.pi / 2.0 * t) ** 2

  def slope(self, t: Times) -> Times:
    """Returns f'(t)."""
    return math.pi / 2.0 * jnp.sin(math.pi * t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sine(Schedule):
  r"""alpha(t) = 1 - sin(pi t / 2): MD4's "cosine" (arXiv:2406.04329, table 1).

  MD4 writes it 1 - cos(pi (1 - t) / 2); MDLM's "cosine" is `Cosine`.

  Examples:
    >>> import jax.numpy as jnp
    >>> round(float(Sine().alpha(jnp.float32(0.5))), 4)  # 1 - sin(pi / 4)
    0.2929
  """

  def curve(self, t: Times) -> Times:
    """Returns f(t)."""
    return jnp.sin(math.pi / 2.0 * t)

  def slope(self, t: Times) -> Times:
    """Returns f'(t)."""
    return math.pi / 2.0 * jnp.cos(math.pi / 2.0 * t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logarithmic(Schedule):
  r"""f(t) = log2(1 + t): BD3-LM's "log" (arXiv:2503.09573, app. C).

  Examples:
    >>> import jax.numpy as jnp
    >>> round(float(Logarithmic().masked(jnp.float32(0.5))), 4)  # log2(1.5)
    0.585
  """

  def curve(self, t: Times) -> Times:
    """Returns f(t)."""
    return jnp.log1p(t) / math.log(2.0)

  def slope(self, t: Times) -> Times:
    """Returns f'(t)."""
    return 1.0 / (math.log(2.0) * (1.0 + t))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SigmaSchedule(abc.ABC):
  """A schedule stated by sigma(t) between two ends instead of alpha(t)."""

  sigma_min: float = 1e-3
  sigma_max: float = 20.0

  def __post_init__(self):
    if not 0.0 < self.sigma_min < self.sigma_max:
      raise ValueError(
        "a schedule needs 0 < sigma_min < sigma_max, not sigma_min "
        f"{self.sigma_min} and sigma_max {self.sigma_max}"
      )

  @abc.abstractmethod
  def sigma(self, t: Times) -> Times:
    """Returns the total noise sigma(t)."""

  def told(self, t: Times) -> Times:
    """Returns sigma(t), which has a bound here."""
    return self.sigma(t)

  @abc.abstractmethod
  def dsigma(self, t: Times) -> Times:
    """Returns the noise rate sigma'(t)."""

  def alpha(self, t: Times) -> Times:
    """Returns the probability exp(-sigma) that a token is still clean."""
    return jnp.exp(-self.sigma(t))

  def dalpha(self, t: Times) -> Times:
    """Returns alpha'(t) = -sigma'(t) alpha(t)."""
    return -self.dsigma(t) * self.alpha(t)

  def masked(self, t: Times) -> Times:
    """Returns 1 - alpha(t) without cancellation."""
    return -jnp.expm1(-self.sigma(t))

  def weight(self, t: Times) -> Times:
    """Returns sigma'(t) / expm1(sigma(t))."""
    return self.dsigma(t) / jnp.expm1(self.sigma(t))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometric(_SigmaSchedule):
  r"""sigma(t) = sigma_min^(1 - t) sigma_max^t (arXiv:2310.16834, sec. 5.1).

  Examples:
    >>> import jax.numpy as jnp
    >>> noise = Geometric(sigma_min=0.01, sigma_max=1.0)
    >>> round(float(noise.sigma(jnp.float32(0.5))), 4)
    0.1
  """

  def sigma(self, t: Times) -> Times:
    """Returns the total noise."""
    return self.sigma_min ** (1.0 - t) * self.sigma_max**t

  def dsigma(self, t: Times) -> Times:
    """Returns the noise rate."""
    return self.sigma(t) * math.log(self.sigma_max / self.sigma_min)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmaLinear(_SigmaSchedule):
  r"""sigma(t) = sigma_min + (sigma_max - sigma_min) t: MDLM's "linear".

  Examples:
    >>> import jax.numpy as jnp
    >>> noise = SigmaLinear(sigma_min=0.5, sigma_max=1.5)
    >>> round(float(noise.alpha(jnp.float32(0.5))), 4)  # exp(-1)
    0.3679
  """

  def sigma(self, t: Times) -> Times:
    """Returns the total noise."""
    return self.sigma_min + (self.sigma_max - self.sigma_min) * t

  def dsigma(self, t: Times) -> Times:
    """Returns the noise rate."""
    return jnp.full_like(t, self.sigma_max - self.sigma_min)


SCHEDULES = {
  "linear": Linear,
  "loglinear": LogLinear,
  "cosine": Cosine,
  "cosine_squared": CosineSquared,
  "sine": Sine,
  "logarithmic": Logarithmic,
  "polynomial": Polynomial,
  "geometric": Geometric,
  "sigma_linear": SigmaLinear,
}

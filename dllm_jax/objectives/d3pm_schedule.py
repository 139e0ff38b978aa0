"""How much each of D3PM's T steps replaces: beta schedules (arXiv:2107.03006).

Computed on the host in float64; nothing here knows a transition matrix.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearBeta:
  """beta rises linearly over the steps.

  Attributes:
    start: beta of the first step.
    stop: beta of the last step.
  """

  start: float = 1e-4
  stop: float = 0.02

  def __post_init__(self):
    if not 0.0 <= self.start <= self.stop <= 1.0:
      raise ValueError(
        "linear betas need 0 <= start <= stop <= 1, not "
        f"{self.start} and {self.stop}"
      )

  def betas(self, steps: int) -> np.ndarray:
    """Returns beta of each step, `[T]`."""
    return np.linspace(self.start, self.stop, steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineBeta:
  r"""beta_n = min(1 - a_n / a_{n-1}, cap), a_n = cos((n/T + o) / (1 + o) pi/2).

  Attributes:
    offset: o, which keeps the first steps from vanishing.
    cap: the largest beta.
  """

  offset: float = 0.008
  cap: float = 0.999

  def betas(self, steps: int) -> np.ndarray:
    """Returns beta of each step, `[T]`."""
    n = np.arange(steps + 1) / steps
    alpha = np.cos((n + self.offset) / (1 + self.offset) * np.pi / 2)
    return np.minimum(1 - alpha[1:] / alpha[:-1], self.cap)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MutualInformation:
  r"""beta_n = 1 / (T - n + 1): what is known of x0 falls linearly (eq. 9).

  Exact for absorbing matrices, where it makes keep_n = 1 - n/T; the Jensen-Shannon
  ("jsd") schedule of the image code is the same.
  """

  def betas(self, steps: int) -> np.ndarray:
    """Returns beta of each step, `[T]`."""
    return 1.0 / (steps - np.arange(steps))


BetaSchedule = LinearBeta | CosineBeta | MutualInformation

BETAS = {
  "linear": LinearBeta,
  "cosine": CosineBeta,
  "mutual_information": MutualInformation,
}

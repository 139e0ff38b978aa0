r"""MDLM: masked diffusion with the SUBS parameterisation (arXiv:2406.07524).

Each token is masked on its own with probability 1 - alpha(t); the network
restores all of them at once. The continuous-time bound is a weighted average of
cross-entropies over the masked tokens (eq. 10):

    L = E_t [ -alpha'(t) / (1 - alpha(t)) sum_i 1[z_i = m] (-log x_theta(z)_i) ]
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from dllm_jax.core.schedule import LogLinear, SCHEDULES, Schedule
from dllm_jax.core.time import TimeRule, draw_times
from dllm_jax.core.types import Process
from dllm_jax.objectives.base import Discrete, Weights, corrupt_to, evenly


@dataclasses.dataclass(frozen=True, kw_only=True)
class MDLM(Discrete):
  """Masked diffusion language modelling (Sahoo et al. 2024).

  Attributes:
    schedule: alpha(t). With a floor above 0 (`LogLinear`) the weight stays 1/t.
    time_rule: how training times are drawn over the global batch.
    time_epsilon: training times lie in [time_epsilon, 1).
    sampling_epsilon: the last time before noise removal.
    time_conditioning: whether the network is told sigma(t).
  """

  schedule: Schedule = dataclasses.field(
      default=LogLinear(), metadata={"choices": SCHEDULES}
  )
  time_rule: TimeRule = "stratified"
  time_epsilon: float = 1e-3
  sampling_epsilon: float = 1e-5
  time_conditioning: bool = False

  def __post_init__(self):
    super().__post_init__()
    if self.mask_id is None:
      raise ValueError("masked diffusion needs a mask_id")
    if not 0.0 <= self.time_epsilon < 1.0:
      raise ValueError(
          f"time_epsilon must lie in [0, 1), not {self.time_epsilon}"
      )

  def conditioning(self, t: Float[Array, "B #T"]) -> Array | None:
    """Returns sigma(t) if the network is told the time."""
    return self.schedule.sigma(t) if self.time_conditioning else None

  def time(
      self, key: Key[Array, ""], shape: tuple[int, int]
  ) -> Float[Array, "B 1"]:
    """Returns one time a row: t = (1 - eps) u + eps."""
    u = draw_times(key, (shape[0], 1), self.time_rule)
    return (1.0 - self.time_epsilon) * u + self.time_epsilon

  def corrupt(
      self,
      process: Process,
      key: Key[Array, ""],
      x0: Int[Array, "B L"],
      t: Float[Array, "B #L"],
  ) -> Int[Array, "B L"]:
    """Returns z_t: each token is masked with probability 1 - alpha(t)."""
    del process
    return corrupt_to(key, x0, self.schedule.masked(t), self.mask_id)

  def weigh(
      self,
      process: Process,
      x0: Int[Array, "B L"],
      z: Int[Array, "B L"],
      t: Float[Array, "B #L"],
      loss_mask: Bool[Array, "B L"],
  ) -> Weights:
    """Returns -alpha' / (1 - alpha) at masked positions (eq. 10)."""
    del process, x0
    masked = (z == self.mask_id) & loss_mask
    weight = jnp.where(masked, self.schedule.weight(t), 0.0)
    return Weights(loss=weight, count=evenly(loss_mask), bound=weight)

  def log_x0(
      self,
      process: Process,
      logits: Float[Array, "B c V"],
      z: Int[Array, "B c"],
      t: Float[Array, "B #c"],
  ) -> Float[Array, "B c V"]:
    """Returns SUBS log-probabilities (sec. 3.2.3).

    The mask has probability 0, and a token that is not masked is copied.
    """
    del process, t
    ids = jnp.arange(self.vocab_size)
    logits = jnp.where(ids == self.mask_id, -jnp.inf, logits)
    copied = jnp.where(ids == z[..., None], 0.0, -jnp.inf)
    masked = (z == self.mask_id)[..., None]
    return jnp.where(masked, jax.nn.log_softmax(logits), copied)

  def posterior(
      self,
      process: Process,
      logits: Float[Array, "B c V"],
      z: Int[Array, "B c"],
      t: Float[Array, "B #c"],
      s: Float[Array, "B #c"],
  ) -> Float[Array, "B c V"]:
    r"""Returns log p(z_s | z_t) (eq. 7).

    A masked token stays masked with probability (1 - alpha(s)) / (1 - alpha(t))
    and is else drawn from the network; other tokens stay.
    """
    stay = (self.schedule.masked(s) / self.schedule.masked(t))[..., None]
    log_x0 = self.log_x0(process, logits, z, t)
    is_mask = jnp.arange(self.vocab_size) == self.mask_id
    revealed = jnp.where(is_mask, jnp.log(stay), jnp.log1p(-stay) + log_x0)
    return jnp.where((z == self.mask_id)[..., None], revealed, log_x0)

  def grid(self, steps: int) -> Float[Array, "steps+1"]:
    """Returns times from 1 to `sampling_epsilon`, then 0: noise removal."""
    if steps < 1:
      raise ValueError(f"sampling needs at least 1 step, not {steps}")
    times = jnp.linspace(1.0, self.sampling_epsilon, steps)
    return jnp.append(times, 0.0)

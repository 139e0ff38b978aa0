"""What continuous-time objectives over `mixture.Parts` share.

Times, corruption, the chunked score, the reverse step and the prior; a system
adds how fast its parts move (`parts`) and the integrand of its bound
(`token_loss`).
"""

import abc
import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dllm_jax.core import check
from dllm_jax.core.time import draw_times, TimeRule
from dllm_jax.core.types import Batch, Noise, Process
from dllm_jax.core.vocabulary import reduce
from dllm_jax.objectives.base import check_choice, Discrete
from dllm_jax.objectives.mixture import (
  between,
  corrupt_by,
  draw_prior,
  likelihood,
  log_marginal,
  noise_alone,
  normalised,
  Parts,
  parts_divergence,
  real_tokens,
  safe_log,
)
from dllm_jax.objectives.texts import evenly, Weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContinuousMixture(Discrete):
  """What objectives over `Parts` in continuous time share.

  A subclass writes `parts`, `token_loss` and `conditioning`.

  Attributes:
    time_rule: how training times are drawn over the global batch.
    time_epsilon: training times lie in [time_epsilon, 1).
    sampling_epsilon: the last time before noise removal.
    time_conditioning: whether the network is told the time.
  """

  time_rule: TimeRule = "stratified"
  time_epsilon: float = 1e-3
  sampling_epsilon: float = 1e-5
  time_conditioning: bool = True

  replaces: ClassVar[bool] = True

  def __post_init__(self):
    super().__post_init__()
    check_choice("time rule", self.time_rule, TimeRule)
    for name in ("time_epsilon", "sampling_epsilon"):
      check.within(name, getattr(self, name), "[0, 0.5)")

  @abc.abstractmethod
  def parts(self, t: Float[Array, "*n"]) -> Parts:
    """Returns the fate of a token at time t."""

  @abc.abstractmethod
  def token_loss(
    self,
    process: Process,
    logits: Float[Array, "B c V"],
    x0: Int[Array, "B c"],
    z: Int[Array, "B c"],
    t: Float[Array, "B #c"],
  ) -> Float[Array, "B c"]:
    """Returns the integrand of the bound on a chunk, in nats per token."""

  def prior_loss(self) -> Float[Array, ""]:
    """Returns KL(q(z_1 | x0) || prior), in nats per token."""
    end = self.parts(jnp.ones(()))
    return parts_divergence(
      end, noise_alone(end), self.vocab_size, self.mask_id
    )

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
    """Returns a draw of q(z_t | x0)."""
    return corrupt_by(key, x0, self.parts(t), self.vocab_size, self.mask_id)

  def corruption(self, process, x0, t) -> Float[Array, "B L"]:
    """Returns the probability that a token of z_t differs from x0's."""
    parts = self.parts(t)
    moved = 1.0 - 1.0 / real_tokens(self.vocab_size, self.mask_id)
    return jnp.broadcast_to(parts.mask + moved * parts.uniform, x0.shape)

  def weigh(
    self,
    process: Process,
    x0: Int[Array, "B L"],
    z: Int[Array, "B L"],
    t: Float[Array, "B #L"],
    batch: Batch,
  ) -> Weights:
    """Returns one for each supervised token: `token_loss` has the weight."""
    one = evenly(batch.loss_mask)
    return Weights(loss=one, count=one, bound=one)

  def score(
    self, process, out, x0, z, t, weights
  ) -> tuple[Float[Array, ""], Float[Array, "B L"]]:
    """Returns the summed loss and the bound, from `token_loss` on chunks."""

    def terms(logits, x0, z, t):
      return self.token_loss(process, logits, x0, z, t)

    terms = reduce(terms, out, x0, z, t, live=2)
    bound = jax.lax.stop_gradient(terms) + self.prior_loss()
    return jnp.sum(weights.loss * terms), weights.bound * bound

  def log_x0(self, process, logits, z, t) -> Float[Array, "B c V"]:
    """Returns log p(x0 | z_t): a softmax in which a mask has no share."""
    if self.mask_id is not None:
      is_mask = jnp.arange(self.vocab_size) == self.mask_id
      logits = jnp.where(is_mask, -jnp.inf, logits)
    return jax.nn.log_softmax(logits)

  def posterior(self, process, logits, z, t, s) -> Float[Array, "B c V"]:
    r"""Returns log p(z_s | z_t) ~ q(z_t | z_s) q(z_s | x0 ~ p_theta)."""
    log_p = self.log_x0(process, logits, z, t)
    return self.reversed(log_p, z, self.parts(t), self.parts(s))

  def reversed(
    self,
    log_p: Float[Array, "B c V"],
    z: Int[Array, "B c"],
    t: Parts,
    s: Parts,
  ) -> Float[Array, "B c V"]:
    """Returns log p(z_s | z_t) for x0 ~ p, normalised."""
    jump = between(s, t, absorbing=False)
    f = likelihood(jump, z, self.vocab_size, self.mask_id, absorbing=False)
    log_q = log_marginal(s, log_p, self.mask_id)
    return normalised(safe_log(f) + log_q, z)

  def prior(self, noise: Noise, shape: tuple[int, int]) -> Int[Array, "B T"]:
    """Returns a draw of pure noise."""
    share = noise_alone(self.parts(jnp.ones(()))).mask
    return draw_prior(noise, shape, share, self.vocab_size, self.mask_id)

  def grid(self, steps: int) -> Float[Array, "steps+1"]:
    """Returns times from 1 to `sampling_epsilon`, then 0: noise removal."""
    if steps < 1:
      raise ValueError(f"sampling needs at least 1 step, not {steps}")
    times = jnp.linspace(1.0, self.sampling_epsilon, steps)
    return jnp.append(times, 0.0)

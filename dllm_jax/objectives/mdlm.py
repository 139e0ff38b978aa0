r"""MDLM: masked diffusion with the SUBS parameterisation (arXiv:2406.07524).

Each token is masked on its own with probability 1 - alpha(t); the network
restores all of them at once. The continuous-time bound is a weighted average of
cross-entropies over the masked tokens (eq. 10):

    L = E_t [ -alpha'(t) / (1 - alpha(t)) sum_i 1[z_i = m] (-log x_theta(z)_i) ]

With T steps the weight is T (alpha(s) - alpha(t)) / (1 - alpha(t)), where
s = t - 1/T.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dllm_jax.core import check
from dllm_jax.core.mask import Causal
from dllm_jax.core.schedule import (
  Linear,
  LogLinear,
  Schedule,
  SCHEDULES,
  SigmaLinear,
)
from dllm_jax.core.time import draw_times, TimeRule
from dllm_jax.core.types import Batch, Denoise, Loss, Process
from dllm_jax.core.vocabulary import cross_entropy, forbid
from dllm_jax.objectives.base import (
  check_choice,
  corrupt_to,
  Discrete,
  Drawn,
  subs,
)
from dllm_jax.objectives.texts import (
  evenly,
  Fill,
  FillKind,
  next_token_loss,
  Normalisation,
  normalise,
  Weights,
  with_one_masked,
)

Weighting = Literal["bound", "uniform", "linear"]
Parameterisation = Literal["subs", "softmax"]
TimeChange = Literal["none", "change_of_variables", "importance_sampling"]

_HALVINGS = 30
"""Of the interval of times, which are then known to 1e-9."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MDLM(Discrete):
  r"""Masked diffusion language modelling (Sahoo et al. 2024).

  Attributes:
    schedule: alpha(t). With a floor above 0 (`LogLinear`) the weight stays 1/t.
    time_rule: how training times are drawn over the global batch.
    time_epsilon: training times lie in [time_epsilon, time_limit).
    time_limit: the end of training times, at most 1.
    sampling_epsilon: the last time before noise removal.
    time_conditioning: whether the network is told sigma(t).
    steps: T of the discrete-time bound; None for continuous time.
    time_change: makes the weight constant by a mask probability that is uniform
      in its logarithm, log(1 - e^-sigma). "change_of_variables" makes that the
      meaning of t (and what the network is told); "importance_sampling" draws t
      so.
    parameterisation: "subs" gives the mask probability 0 in the loss; "softmax"
      leaves it in, as LLaDA's family does. Sampling never draws a mask.
    weighting: factor of a masked token in the loss: that of the bound, 1, or
      1 - t. What is reported as the bound stays the bound.
    normalisation: what the loss is an average over, see `normalise`.
    shift: 1 if the output at slot i predicts the token of slot i + 1, as in
      autoregressive networks and Dream: the token before, if it is there, is
      then read without attention, and small networks learn sooner.
    kept_weight: factor, in the loss, of the cross-entropy of tokens that are not
      masked, at least 0; to copy them is learned before context is, and is no
      part of the bound.
    mask_prompts: whether prompts are masked, and count, as answers do.
    mask_at_least_one: whether a text of which nothing was masked gets one mask.
    autoregressive_weight: factor, in the loss, of the cross-entropy of each
      supervised token given those before it, of a causal pass over clean tokens.
    fill: what conversations have behind them: end-of-text tokens that count as
      answers do, such tokens that are only seen, or nothing.
    fill_to: the tokens of which a filled conversation has a multiple; 0: it
      fills its row, and a row of several ends where the last one does.

  Examples:
    >>> float(MDLM(vocab_size=5, mask_id=4, schedule=Linear()).weight(0.25))
    4.0
  """

  schedule: Schedule = dataclasses.field(
    default=LogLinear(), metadata={"choices": SCHEDULES}
  )
  time_rule: TimeRule = "stratified"
  time_epsilon: float = 1e-3
  time_limit: float = 1.0
  sampling_epsilon: float = 1e-5
  time_conditioning: bool = False
  steps: int | None = None
  time_change: TimeChange = "none"
  parameterisation: Parameterisation = "subs"
  weighting: Weighting = "bound"
  normalisation: Normalisation = "token"
  shift: Literal[0, 1] = 0
  kept_weight: float = 0.0
  mask_prompts: bool = False
  mask_at_least_one: bool = False
  autoregressive_weight: float = 0.0
  fill: FillKind = "counted"
  fill_to: int = 0

  def __post_init__(self):
    super().__post_init__()
    if self.mask_id is None:
      raise ValueError("masked diffusion needs a mask_id")
    check.within("time_epsilon", self.time_epsilon, "[0, 1)")
    check.within("sampling_epsilon", self.sampling_epsilon, "[0, 1)")
    check.within("time_limit", self.time_limit, f"({self.time_epsilon}, 1]")
    check.at_least(self, 0, "autoregressive_weight", "fill_to", "kept_weight")
    check_choice("fill", self.fill, FillKind)
    if self.steps is not None and self.steps < 1:
      raise ValueError(
        f"steps (T) must be at least 1, or None for continuous time, not "
        f"{self.steps}"
      )
    if self.shift not in (0, 1):
      raise ValueError(f"shift must be 0 or 1, not {self.shift}")
    check_choice("time rule", self.time_rule, TimeRule)
    check_choice("parameterisation", self.parameterisation, Parameterisation)
    check_choice("weighting", self.weighting, Weighting)
    check_choice("normalisation", self.normalisation, Normalisation)
    check_choice("time_change", self.time_change, TimeChange)
    if self.time_change != "none":
      self._check_time_change()

  def _check_time_change(self) -> None:
    if self.steps is not None:
      raise ValueError(
        f"{self.time_change} is of continuous time: set steps to None"
      )
    if not isinstance(self.schedule, (Linear, SigmaLinear)):
      raise ValueError(
        f"{self.time_change} supports the schedules linear and loglinear "
        f"with a floor, and sigma_linear, not {type(self.schedule).__name__}"
      )
    if isinstance(self.schedule, Linear) and self.schedule.floor <= 0.0:
      raise ValueError(
        f"{self.time_change} needs a schedule with a floor above 0, the "
        "smallest sigma that it visits"
      )

  def conditioning(self, t: Float[Array, "B #T"]) -> Array | None:
    """Returns sigma(t) if the network is told the time, t if it is changed."""
    if not self.time_conditioning:
      return None
    changed = self.time_change == "change_of_variables"
    return t if changed else self.schedule.told(t)

  def _log_masked_ends(self) -> tuple[Array, Array]:
    """Returns f at the ends of a time change: log mask probabilities."""
    s = self.schedule
    low = s.sigma_min if isinstance(s, SigmaLinear) else s.floor
    sigma = jnp.stack([jnp.float32(low), s.sigma(jnp.ones(()))])
    return tuple(jnp.log1p(-jnp.exp(-sigma)))

  def masked(self, t: Float[Array, "B #T"]) -> Float[Array, "B #T"]:
    """Returns the probability that a token is masked at time t."""
    if self.time_change != "change_of_variables":
      return self.schedule.masked(t)
    low, high = self._log_masked_ends()
    return jnp.exp(low + t * (high - low))

  def weight(self, t: Float[Array, "B #T"]) -> Float[Array, "B #T"]:
    """Returns the factor of a masked token's cross-entropy in the bound."""
    if self.time_change != "none":
      # f(1) is about 0, and the original leaves it out of f(1) - f(0).
      return jnp.broadcast_to(-self._log_masked_ends()[0], t.shape)
    if self.steps is None:
      return self.schedule.weight(t)
    later = self.schedule.masked(t)
    earlier = self.schedule.masked(t - 1.0 / self.steps)
    return self.steps * (later - earlier) / later

  def time(
    self, key: Key[Array, ""], shape: tuple[int, int]
  ) -> Float[Array, "B 1"]:
    """Returns one time a row: t = (limit - eps) u + eps, changed as asked."""
    u = draw_times(key, (shape[0], 1), self.time_rule)
    width = self.time_limit - self.time_epsilon
    return self.place(width * u + self.time_epsilon)

  def place(self, t: Float[Array, "B #T"]) -> Float[Array, "B #T"]:
    """Returns the training times of evenly spread ones.

    On the grid of T steps, (floor(t T) + 1) / T; under importance sampling,
    where log(1 - e^-sigma) is linear in the given t.
    """
    if self.steps is not None:
      return (jnp.floor(t * self.steps) + 1.0) / self.steps
    if self.time_change != "importance_sampling":
      return t
    low, high = self._log_masked_ends()
    masked = jnp.exp(low + t * (high - low))
    s = self.schedule
    if isinstance(s, SigmaLinear):
      return (-jnp.log1p(-masked) - s.sigma_min) / (s.sigma_max - s.sigma_min)
    return masked / (1.0 - s.floor)

  @classmethod
  def filling(cls, fields) -> Fill:
    """Returns what conversations have behind them."""
    return Fill(fields["fill"], fields["fill_to"])

  def supervised(self, batch: Batch) -> Batch:
    """Returns the batch with all that counts, prompts too where they do."""
    if not self.mask_prompts:
      return batch
    return batch.replace(loss_mask=batch.segment_ids > 0)

  def draw(self, process, key, batch, *, step) -> Drawn:
    """Returns times and corrupted rows; unsupervised tokens stay clean."""
    batch = self.supervised(batch)
    drawn = super().draw(process, key, batch, step=step)
    if not self.mask_at_least_one:
      return drawn
    z = with_one_masked(key, drawn.z, batch, self.mask_id)
    return drawn.replace(z=z)

  def loss(self, process, denoise, drawn, batch, *, step) -> Loss:
    """Returns the loss of one evaluation, or of two with a causal one."""
    batch = self.supervised(batch)
    loss = super().loss(process, denoise, drawn, batch, step=step)
    if not self.autoregressive_weight:
      return loss
    clean = jnp.zeros((batch.tokens.shape[0], 1))
    inputs = self.inputs(process, batch.tokens, clean, batch)
    out = denoise(inputs.replace(mask=Causal()))
    never = self.mask_id if self.parameterisation == "subs" else None
    more = next_token_loss(out, batch, self.normalisation, never, loss.weight)
    return loss.replace(total=loss.total + self.autoregressive_weight * more)

  def corrupt(
    self,
    process: Process,
    key: Key[Array, ""],
    x0: Int[Array, "B L"],
    t: Float[Array, "B #L"],
  ) -> Int[Array, "B L"]:
    """Returns z_t: each token is masked with probability 1 - alpha(t)."""
    return corrupt_to(key, x0, self.masked(t), self.mask_id)

  def corruption(self, process, x0, t) -> Float[Array, "B L"]:
    """Returns the probability that a token of z_t differs from x0's."""
    return jnp.broadcast_to(self.masked(t), x0.shape)

  def weigh(
    self,
    process: Process,
    x0: Int[Array, "B L"],
    z: Int[Array, "B L"],
    t: Float[Array, "B #L"],
    batch: Batch,
  ) -> Weights:
    """Returns -alpha' / (1 - alpha) at masked positions (eq. 10).

    The loss may count the others too, by `kept_weight`.
    """
    masked = (z == self.mask_id) & batch.loss_mask
    bound = jnp.where(masked, self.weight(t), 0.0)
    loss = jnp.where(
      masked, self.emphasis(process, z, t, batch), self.kept_weight
    )
    loss = jnp.where(batch.loss_mask, loss, 0.0)
    weights = Weights(loss=loss, count=evenly(batch.loss_mask), bound=bound)
    return normalise(weights, self.normalisation, batch)

  def emphasis(
    self,
    process: Process,
    z: Int[Array, "B L"],
    t: Float[Array, "B #L"],
    batch: Batch,
  ) -> Float[Array, "B #L"]:
    """Returns the factor of a masked token's cross-entropy in the loss."""
    if self.weighting == "bound":
      return self.weight(t)
    return jnp.ones_like(t) if self.weighting == "uniform" else 1.0 - t

  @property
  def exchangeable(self) -> bool:
    """Whether all tokens are masked at one rate in continuous time."""
    return self.steps is None

  def when(self, rate: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns the time at which tokens are masked at a rate, by bisection.

    The schedule's ends for rates that it does not reach.
    """

    def halve(_, ends):
      low, high = ends
      middle = 0.5 * (low + high)
      later = self.masked(middle) < rate
      return jnp.where(later, middle, low), jnp.where(later, high, middle)

    ends = jnp.zeros_like(rate), jnp.ones_like(rate)
    return jax.lax.fori_loop(0, _HALVINGS, halve, ends)[1]

  def restore(
    self,
    process: Process,
    denoise: Denoise,
    z: Int[Array, "B L"],
    batch: Batch,
    rate: Float[Array, "B L"],
  ) -> Float[Array, "B L"]:
    """Returns -log p(x0 | z) at the masked positions of z, nats; 0 elsewhere.

    As the loss has it, in one evaluation of the network: the bound of rows that
    are as they are, without its factor.

    Args:
      process: the process's arrays.
      denoise: the network.
      z: the corrupted rows.
      batch: the rows.
      rate: how likely a slot is to be masked, the same all over a block; read
        only where the network is told the time.
    """
    step = jnp.asarray(jnp.iinfo(jnp.int32).max, jnp.int32)
    drawn = self.draw(process, jax.random.key(0), batch, step=step)
    drawn = drawn.replace(t=jnp.full_like(drawn.t, 0.5), z=z)

    def told(inputs):
      if not self.reads_time:
        return denoise(inputs)
      time = self.conditioning(self.when(rate[:, : drawn.t.shape[1]]))
      # A stream of clean tokens, where there is one, is at time 0.
      clean = inputs.conditioning.shape[1] - time.shape[1]
      time = jnp.pad(time, ((0, 0), (0, clean)))
      return denoise(inputs.replace(conditioning=time))

    loss = self.loss(process, told, drawn, batch, step=step)
    ends = jnp.where(batch.loss_mask, self.end_terms(), 0.0)
    return (loss.bound - ends) / self.weight(drawn.t)

  def end_terms(self) -> Float[Array, ""]:
    """Returns what the bound has for the ends of time, nats per token: nothing.

    Over all counts there are none: sampling begins with masks only and leaves
    none, where a clipped schedule pays for its ends.
    """
    return jnp.zeros(())

  def score(
    self, process, out, x0, z, t, weights
  ) -> tuple[Float[Array, ""], Float[Array, "B L"]]:
    """Returns the summed loss and the bound, from a weighted cross-entropy."""
    if self.parameterisation == "subs":
      out = forbid(out, self.mask_id)
    total, terms = cross_entropy(out, x0, weights.loss)
    return total, weights.bound * terms

  def log_x0(self, process, logits, z, t) -> Float[Array, "B c V"]:
    """Returns SUBS log-probabilities (sec. 3.2.3)."""
    return subs(logits, z, self.mask_id)

  def posterior(self, process, logits, z, t, s) -> Float[Array, "B c V"]:
    r"""Returns log p(z_s | z_t) (eq. 7).

    A masked token stays masked with probability (1 - alpha(s)) / (1 - alpha(t))
    and is else drawn from the network; other tokens stay. A step to s = 0
    removes every mask, also where the schedule's alpha(0) is below 1.
    """
    stay = self.stay(t, s)[..., None]
    log_x0 = self.log_x0(process, logits, z, t)
    is_mask = jnp.arange(self.vocab_size) == self.mask_id
    revealed = jnp.where(is_mask, jnp.log(stay), jnp.log1p(-stay) + log_x0)
    return jnp.where((z == self.mask_id)[..., None], revealed, log_x0)

  def stay(
    self, t: Float[Array, "B #T"], s: Float[Array, "B #T"]
  ) -> Float[Array, "B #T"]:
    """Returns the probability that a mask of time t is still there at s."""
    return jnp.where(s > 0.0, self.masked(s) / self.masked(t), 0.0)

  def grid(self, steps: int) -> Float[Array, "steps+1"]:
    """Returns times from 1 to `sampling_epsilon`, then 0: noise removal."""
    if steps < 1:
      raise ValueError(f"sampling needs at least 1 step, not {steps}")
    times = jnp.linspace(1.0, self.sampling_epsilon, steps)
    return jnp.append(times, 0.0)

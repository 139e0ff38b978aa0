r"""D3PM: diffusion by transition matrices in T steps (arXiv:2107.03006).

Step n replaces tokens by the rows of Q_n. The network predicts x0, and

    p(z_{n-1} | z_n) ~ q(z_n | z_{n-1}) sum_x0 q(z_{n-1} | x0) p_theta(x0 | z_n)

(eq. 4 with the sum taken inside, as the code does). The loss is the variational
bound, KL(q(z_{n-1} | z_n, x0) || p_theta(z_{n-1} | z_n)) for n > 1 and a
cross-entropy for n = 1, plus lambda times the cross-entropy of x0 (eq. 5). Time t
is n / T; what the code calls step i is n - 1 = t T - 1.
"""

import dataclasses
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key
import numpy as np

from dllm_jax.core.noise import inverse_cdf
from dllm_jax.core.time import draw_times, TimeRule
from dllm_jax.core.types import Batch, Noise, Process
from dllm_jax.core.vocabulary import reduce
from dllm_jax.objectives.base import (
  check_choice,
  Discrete,
  TokenSpace,
)
from dllm_jax.objectives.d3pm_schedule import (
  BETAS,
  BetaSchedule,
  MutualInformation,
)
from dllm_jax.objectives.d3pm_transition import (
  Absorbing,
  at,
  MaskUniform,
  Transition,
  TRANSITIONS,
  Uniform,
)
from dllm_jax.objectives.mixture import (
  corrupt_by,
  draw_prior,
  normalised,
  one_hot_log,
  real_tokens,
  step_divergence,
  vocabulary_without_mask,
)
from dllm_jax.objectives.texts import evenly, Weights

Final = Literal["network", "posterior"]
Support = Literal["tokens", "vocabulary"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class D3PM(Discrete):
  """Discrete denoising diffusion (Austin et al. 2021).

  The training loss is T (bound term + lambda cross-entropy), in nats per token
  like every other objective's; the original leaves out the factor T.

  Attributes:
    transition: the family of matrices.
    schedule: beta of each step.
    steps: T.
    cross_entropy: lambda.
    final: p(z_0 | z_1) is the network's x0 ("network", image code) or follows the
      formula like any other step ("posterior", text code).
    support: x0 is predicted among real tokens ("tokens") or with the mask
      ("vocabulary", the originals).
    epsilon: added to probabilities before their log (1e-6 in the image code);
      above 0 the terms are summed over the whole vocabulary.
    time_rule: how steps are drawn over the global batch.
    time_conditioning: whether the network is told n - 1.

  Examples:
    >>> d3pm = D3PM(vocab_size=4, steps=4)
    >>> [float(t) for t in d3pm.grid(2)], d3pm.replaces
    ([1.0, 0.5, 0.0], True)
    >>> D3PM(vocab_size=5, mask_id=4, transition=Absorbing()).replaces
    False
  """

  transition: Transition = dataclasses.field(
    default=Uniform(), metadata={"choices": TRANSITIONS}
  )
  schedule: BetaSchedule = dataclasses.field(
    default=MutualInformation(), metadata={"choices": BETAS}
  )
  steps: int = 1000
  cross_entropy: float = 0.01
  final: Final = "posterior"
  support: Support = "tokens"
  epsilon: float = 0.0
  time_rule: TimeRule = "stratified"
  time_conditioning: bool = True

  def __post_init__(self):
    super().__post_init__()
    if self.steps < 1:
      raise ValueError(f"D3PM needs at least T = 1 steps, not {self.steps}")
    for field, legal in (("schedule", BETAS), ("transition", TRANSITIONS)):
      value = getattr(self, field)
      if not isinstance(value, tuple(legal.values())):
        raise ValueError(
          f"D3PM does not support the {field} {value!r}; legal: "
          f"{', '.join(legal)}"
        )
    check_choice("final", self.final, Final)
    check_choice("support", self.support, Support)
    check_choice("time rule", self.time_rule, TimeRule)
    if self.epsilon < 0 or self.cross_entropy < 0:
      raise ValueError(
        "epsilon and cross_entropy must be at least 0, not "
        f"{self.epsilon} and {self.cross_entropy}"
      )
    self._check_mask()
    self.transition.check(self.vocab_size, self.steps)

  def _check_mask(self):
    kind = type(self.transition).__name__
    if self.transition.masks and self.mask_id is None:
      raise ValueError(f"{kind} transitions need a mask_id")
    if not self.transition.masks and self.mask_id is not None:
      raise ValueError(
        f"{kind} transitions have no mask: mask_id {self.mask_id} may not lie "
        f"inside their vocabulary of {self.vocab_size}; leave mask_id out, or "
        "take absorbing or mask_uniform"
      )
    mixed = isinstance(self.transition, MaskUniform)
    if mixed and self.support == "vocabulary":
      raise ValueError(
        "mask_uniform predicts x0 among real tokens: set support to tokens"
      )

  @classmethod
  def over(cls, space: TokenSpace, **fields: Any) -> Self:
    """Returns the objective over a token space, with a mask if it masks."""
    if fields.get("transition", Uniform()).masks:
      return super().over(space, **fields)
    return cls(vocab_size=vocabulary_without_mask(space, "D3PM"), **fields)

  @property
  def replaces(self) -> bool:
    """Whether noise replaces tokens: with all matrices but absorbing ones."""
    return not isinstance(self.transition, Absorbing)

  def init(self, key: Key[Array, ""]) -> Process:
    """Returns the matrices, as constants."""
    betas = np.asarray(self.schedule.betas(self.steps), np.float64)
    tables = self.transition.tables(betas, self.vocab_size, self.mask_id)
    return Process(constants=tables)

  def step(self, t: Float[Array, "*n"]) -> Int[Array, "*n"]:
    """Returns the step n of time n / T, 0 for clean."""
    n = jnp.round(t * self.steps).astype(jnp.int32)
    return jnp.clip(n, 0, self.steps)

  def conditioning(self, t: Float[Array, "B #T"]) -> Array | None:
    """Returns n - 1 = t T - 1 if the network is told the time."""
    return t * self.steps - 1.0 if self.time_conditioning else None

  def time(
    self, key: Key[Array, ""], shape: tuple[int, int]
  ) -> Float[Array, "B 1"]:
    """Returns n / T for one uniform n in 1 ... T a row."""
    u = draw_times(key, (shape[0], 1), self.time_rule)
    return (jnp.floor(u * self.steps) + 1.0) / self.steps

  def corrupt(
    self,
    process: Process,
    key: Key[Array, ""],
    x0: Int[Array, "B L"],
    t: Float[Array, "B #L"],
  ) -> Int[Array, "B L"]:
    """Returns a draw of q(z_n | x0)."""
    tables, n = process.constants, self.step(t)
    if self.transition.closed:
      parts = at(tables["cumulative"], n)
      return corrupt_by(key, x0, parts, self.vocab_size, self.mask_id)
    log_p = jnp.log(tables["cumulative"][n, x0])
    return inverse_cdf(jax.random.bits(key, (*x0.shape, 2)), log_p)

  def corruption(self, process, x0, t) -> Float[Array, "B L"]:
    """Returns the probability that a token of z_t differs from x0's."""
    cumulative, n = process.constants["cumulative"], self.step(t)
    if not self.transition.closed:
      return 1.0 - cumulative[n, x0, x0]
    parts = at(cumulative, n)
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
    """Returns T at supervised tokens: one step stands for all of them."""
    one = evenly(batch.loss_mask)
    return Weights(loss=self.steps * one, count=one, bound=self.steps * one)

  def score(
    self, process, out, x0, z, t, weights
  ) -> tuple[Float[Array, ""], Float[Array, "B L"]]:
    """Returns the summed loss and the bound with its prior term."""

    def terms(logits, x0, z, t):
      return self.token_terms(process, logits, x0, z, t)

    step, clean = reduce(terms, out, x0, z, t, live=3)
    prior = process.constants["prior_loss"]
    prior = prior[x0] if prior.ndim else prior
    supervised = jnp.where(weights.bound > 0, prior, 0.0)
    total = jnp.sum(weights.loss * (step + self.cross_entropy * clean))
    return total, weights.bound * jax.lax.stop_gradient(step) + supervised

  def token_terms(
    self,
    process: Process,
    logits: Float[Array, "B c V"],
    x0: Int[Array, "B c"],
    z: Int[Array, "B c"],
    t: Float[Array, "B #c"],
  ) -> tuple[Float[Array, "B c"], Float[Array, "B c"]]:
    """Returns one step's term of the bound and the cross-entropy, in nats."""
    tables, n = process.constants, self.step(t)
    log_p = self.log_x0(process, logits, z, t)
    clean = -jnp.take_along_axis(log_p, x0[..., None], axis=-1)[..., 0]
    plain = self.epsilon == 0.0 and self.support == "tokens"
    if self.transition.closed and plain:
      early, jump = at(tables["cumulative"], n - 1), at(tables["step"], n)
      term = step_divergence(early, jump, x0, z, log_p, self.mask_id)
    else:
      f = self.transition.neighbour(tables, z, n, self.vocab_size, self.mask_id)
      truth = one_hot_log(x0, self.vocab_size)
      term = _divergence(
        self._log(f),
        self._log(self._marginal(tables, truth, n - 1)),
        self._log(self._marginal(tables, log_p, n - 1)),
      )
    return jnp.where(self._by_network(n - 1), clean, term), clean

  def _marginal(self, tables, log_p, n):
    return self.transition.marginal(tables, log_p, n, self.mask_id)

  def _log(self, p):
    p = p + self.epsilon
    return jnp.where(p > 0, jnp.log(jnp.where(p > 0, p, 1.0)), -jnp.inf)

  def _by_network(self, s: Int[Array, "*n"]) -> Bool[Array, "*n"]:
    return (s == 0) & (self.final == "network")

  def log_x0(self, process, logits, z, t) -> Float[Array, "B c V"]:
    """Returns log p(x0 | z_n): a softmax, over `support`."""
    if self.mask_id is not None and self.support == "tokens":
      is_mask = jnp.arange(self.vocab_size) == self.mask_id
      logits = jnp.where(is_mask, -jnp.inf, logits)
    return jax.nn.log_softmax(logits)

  def posterior(self, process, logits, z, t, s) -> Float[Array, "B c V"]:
    """Returns log p(z_s | z_t), for any two steps."""
    tables, late, early = process.constants, self.step(t), self.step(s)
    log_p = self.log_x0(process, logits, z, t)
    f = self.transition.likelihood(
      tables, z, late, early, self.vocab_size, self.mask_id
    )
    log_q = self._log(self._marginal(tables, log_p, early))
    by_formula = normalised(self._log(f) + log_q, z)
    by_network = self._by_network(early)[..., None]
    return jnp.where(by_network, log_p, by_formula)

  def prior(self, noise: Noise, shape: tuple[int, int]) -> Int[Array, "B T"]:
    """Returns masks and uniform tokens in the proportions of the last step."""
    share = 0.0
    if self.transition.closed:
      betas = np.asarray(self.schedule.betas(self.steps), np.float64)
      last = self.transition.cumulative(betas)
      share = float(last.mask[-1])
    return draw_prior(noise, shape, share, self.vocab_size, self.mask_id)

  def grid(self, steps: int) -> Float[Array, "steps+1"]:
    """Returns times from 1 to 0, each a multiple of 1 / T."""
    if not 1 <= steps <= self.steps:
      raise ValueError(
        f"D3PM samples in 1 to T = {self.steps} steps, not {steps}"
      )
    return jnp.round(jnp.linspace(self.steps, 0, steps + 1)) / self.steps


def _divergence(
  log_f: Float[Array, "*n V"],
  log_a: Float[Array, "*n V"],
  log_b: Float[Array, "*n V"],
) -> Float[Array, "*n"]:
  """Returns KL(f a || f b) of the two, normalised, in nats.

  Tokens of probability zero under f a count nothing and pass no gradient.
  """
  # A z that cannot be (a prompt's clean token at time 1) costs nothing.
  real = jnp.max(log_f + log_a, axis=-1, keepdims=True) > -jnp.inf
  log_f, log_a, log_b = (jnp.where(real, x, 0.0) for x in (log_f, log_a, log_b))
  log_q, log_p = jax.nn.log_softmax(log_f + log_a), log_f + log_b
  log_total = jax.nn.logsumexp(log_p, axis=-1)
  possible = log_q > -jnp.inf
  safe = lambda x: jnp.where(possible, x, 0.0)
  gap = jnp.exp(log_q) * (safe(log_q) - safe(log_p))
  return jnp.sum(gap, axis=-1) + log_total

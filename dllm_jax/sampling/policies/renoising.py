r"""Policies for processes that replace tokens: Psi samplers, renoising.

`Psi` mixes the posterior with fresh noise, for any process; `Renoise` keeps
what is sure and draws the rest anew.
"""

import dataclasses

from flax import struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dllm_jax.core import check
from dllm_jax.core.noise import Tag
from dllm_jax.core.types import Objective
from dllm_jax.core.vocabulary import reduce
from dllm_jax.sampling.policies.ancestral import Stepwise
from dllm_jax.sampling.policies.remasking import masks
from dllm_jax.sampling.policies.rows import NONE
from dllm_jax.sampling.policies.score import confidence, entropy
from dllm_jax.sampling.policies.selection import bounded, Progress, rank, sort


@dataclasses.dataclass(frozen=True, kw_only=True)
class Psi(Stepwise):
  """Mixes the posterior with fresh noise: predictor and corrector in one.

      q = kappa p(z_s | z_t) + (1 - kappa) sum_x0 q(z_s | x0) p(x0 | z_t)

  For uniform and for masked processes (Duo, arXiv:2506.10892).

  Attributes:
    kappa: 1 is ancestral sampling, 0 forgets z_t at each step.
    begins: the time from which noise is mixed in; kappa is 1 before.
    ends: the time at which it stops.

  Examples:
    >>> from dllm_jax.objectives import UDLM
    >>> Psi(objective=UDLM(vocab_size=4), steps=8, kappa=0.9).kappa
    0.9
  """

  kappa: float = 0.95
  begins: float = 1.0
  ends: float = 0.0

  idles = True

  def __post_init__(self):
    super().__post_init__()
    check.within("kappa", self.kappa, "[0, 1]")
    if not 0.0 <= self.ends < self.begins <= 1.0:
      raise ValueError(
        "noise is mixed in for 0 <= ends < t <= begins <= 1, not between "
        f"{self.begins} and {self.ends}"
      )
    if not hasattr(self.objective, "parts") and not masks(self.objective):
      raise ValueError(
        f"Psi sampling needs alpha(t), which {type(self.objective).__name__} "
        "has not: use ancestral sampling"
      )

  def done(self, process, z, state, window) -> Bool[Array, "B"]:
    """Returns rows that are out of steps."""
    return state.step >= self.steps

  def step(
    self, process, noise, out, z, state, active, *,
    window=None, guide=None, rows=NONE, must=None,
  ):  # fmt: skip
    """Returns (z, state, info) after one network evaluation."""
    t, s = self.times(state.step), self.times(state.step + 1)
    mixing = (t <= self.begins) & (t > self.ends) & (s > 0.0)
    kappa = jnp.where(mixing, self.kappa, 1.0)

    def draw(logits, z, t, s, kappa, noise, rows):
      logits = self.drawn(self.filtered(logits, z, rows, guide), z, rows)
      log_q = self.objective.posterior(process, logits, z, t, s)
      log_p = self.objective.posterior(process, logits, z, t, 0.0 * s)
      q = psi(
        jnp.exp(log_q),
        jnp.exp(log_p),
        kept(self.objective, s),
        kappa,
        self.objective.mask_id,
      )
      log_q = jnp.log(q)
      token = noise.categorical(Tag.TOKEN, log_q)
      return token, self.noted(log_q, token)

    z, info = reduce(draw, out, z, t, s, kappa, noise, rows, window=window)
    return z, state.replace(step=state.step + 1), info


def psi(
  back: Float[Array, "B c V"],
  x0: Float[Array, "B c V"],
  alpha_s: Float[Array, "B #c"],
  kappa: Float[Array, "B #c"],
  mask_id: int | None,
) -> Float[Array, "B c V"]:
  """Returns kappa times the posterior and 1 - kappa times x0 noised again.

  Args:
    back: p(z_s | z_t).
    x0: p(x0 | z_t), the posterior at s = 0.
    alpha_s: the probability that a token is kept at s.
    kappa: the share of the posterior.
    mask_id: what noise is; None for uniform tokens.
  """
  vocab, alpha_s = x0.shape[-1], alpha_s[..., None]
  if mask_id is None:
    noised = alpha_s * x0 + (1.0 - alpha_s) / vocab
  else:
    noised = alpha_s * x0 + (1.0 - alpha_s) * (jnp.arange(vocab) == mask_id)
  return kappa[..., None] * back + (1.0 - kappa[..., None]) * noised


def kept(objective: Objective, t: Float[Array, "B #c"]) -> Array:
  """Returns alpha(t) of an objective."""
  if masks(objective):
    return jnp.where(t > 0.0, 1.0 - objective.masked(t), 1.0)
  return objective.parts(t).keep


@struct.dataclass
class Settling(Progress):
  """Progress, and whether a row's canvas has come to rest."""

  settled: Bool[Array, "B"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Renoise(Stepwise):
  """Keeps the surest tokens of each step and draws all others anew.

  Slots in order of entropy are accepted while the entropies before a slot sum
  to no more than the bound; every other slot gets a uniform token
  (DiffusionGemma, for uniform processes). The temperature falls with the time.
  A row stops when its best tokens stand already and its mean entropy is small.

  Attributes:
    bound: nats.
    hot: the temperature at the first step.
    cold: the temperature that the last ones approach.
    rest: mean entropy, in nats, at which a stable row stops.

  Examples:
    >>> from dllm_jax.objectives import UDLM
    >>> Renoise(objective=UDLM(vocab_size=4), steps=8, bound=0.2).bound
    0.2
  """

  bound: float = 0.1
  hot: float = 0.8
  cold: float = 0.4
  rest: float = 0.005

  def __post_init__(self):
    super().__post_init__()
    vectors = hasattr(self.objective, "step_law")
    if self.objective.mask_id is not None or vectors:
      raise ValueError(
        "renoising draws uniform tokens: it needs a uniform process (udlm), not "
        f"{type(self.objective).__name__}, which "
        f"{'moves vectors' if vectors else 'masks'}"
      )
    if not 0.0 < self.cold <= self.hot:
      raise ValueError(
        f"temperatures need 0 < cold <= hot, not {self.cold} and {self.hot}"
      )

  def init(self, process, z, window) -> Settling:
    """Returns the state at a window's start."""
    base = super().init(process, z, window)
    return Settling(
      **vars(base),
      settled=jnp.zeros(window.shape[:1], bool),
    )

  def done(self, process, z, state, window) -> Bool[Array, "B"]:
    """Returns rows that are out of steps or have come to rest."""
    return (state.step >= self.steps) | state.settled

  def step(
    self, process, noise, out, z, state, active, *,
    window=None, guide=None, rows=NONE, must=None,
  ):  # fmt: skip
    """Returns (z, state, info) after one network evaluation."""
    left = 1.0 - state.step / self.steps
    heat = (self.cold + (self.hot - self.cold) * left)[:, None]

    def draw(logits, z, heat, noise, rows):
      logits = self.filtered(logits, z, rows, guide) / heat[..., None]
      token, law = self.token(logits, z, rows, noise)
      info = self.noted(law, token)
      logits = self.drawn(logits, z, rows)
      best = jnp.argmax(logits, axis=-1)
      return token, best, entropy(logits), confidence(logits, token), info

    token, best, h, sure, info = reduce(
      draw, out, z, heat, noise, rows, window=window
    )
    order = rank(-h, active)
    ranked = sort(jnp.where(active, h, jnp.inf), order)
    count = jnp.sum(jnp.cumprod(bounded(ranked, self.bound), axis=1), axis=1)
    keep = active & (order < count[:, None])
    total = jnp.sum(jnp.where(active, h, 0.0), axis=1)
    mean = total / jnp.maximum(jnp.sum(active, axis=1), 1)
    stable = jnp.all((best == z) | ~active, axis=1) & (mean <= self.rest)
    # Deviates: a row's last step keeps every draw, the original random tokens.
    keep |= (stable | (state.step + 1 >= self.steps))[:, None]
    u = noise.uniform(Tag.REMASK, 1)[..., 0]
    random = jnp.floor(u * self.objective.vocab_size).astype(jnp.int32)
    state = state.replace(step=state.step + 1, settled=stable)
    # What is drawn anew is uniform: of it too it is said how likely it was.
    even = -jnp.log(jnp.float32(self.objective.vocab_size))
    info["log_prob"] = jnp.where(keep, info["log_prob"], even)
    info["confidence"] = sure
    return jnp.where(keep, token, random), state, info

r"""Masked diffusion that masks tokens again: ReMDM and correctors.

A masked slot is revealed with some probability, a revealed one is masked again
with another, at each step; `ReMDM` draws both from one categorical, and a rule
says how likely they are.
"""

import dataclasses
from typing import NamedTuple

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.core import check
from dllm_jax.core.noise import Tag
from dllm_jax.core.types import Objective
from dllm_jax.core.vocabulary import reduce
from dllm_jax.sampling.policies.ancestral import Stepwise
from dllm_jax.sampling.policies.rows import NONE
from dllm_jax.sampling.policies.score import confidence
from dllm_jax.sampling.policies.selection import Progress


class Jump(NamedTuple):
  """What a step does.

  Attributes:
    reveal: the probability that a masked slot takes a token.
    remask: the probability that a revealed slot is masked.
    s: the time after it.
  """

  reveal: Float[Array, "B #W"]
  remask: Float[Array, "B #W"]
  s: Float[Array, "B 1"]


class Moment(NamedTuple):
  """Where a row is.

  Attributes:
    t: the time.
    s: the next time of the grid.
    masked_t: 1 - alpha(t), the probability that a token is masked at t.
    masked_s: the same at s.
    memory: minus the probability that each token was revealed with; -inf where
      it is masked.
    first: whether this is the first step.
    step: 1 / the number of steps.
  """

  t: Float[Array, "B 1"]
  s: Float[Array, "B 1"]
  masked_t: Float[Array, "B 1"]
  masked_s: Float[Array, "B 1"]
  memory: Float[Array, "B W"]
  first: Bool[Array, "B 1"]
  step: float


def remasking_jump(
  masked_t: Array, masked_s: Array, sigma: Array | float, s: Array
) -> Jump:
  """Returns the jump that keeps the marginals at a remasking rate sigma.

  reveal = (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t) (arXiv:2503.00307,
  eq. 5), without cancellation. A step to s = 0 reveals everything.
  """
  gained = (masked_t - masked_s) + sigma * (1.0 - masked_t)
  reveal = jnp.clip(gained / jnp.maximum(masked_t, 1e-9), 0.0, 1.0)
  last = masked_s <= 0.0
  return Jump(jnp.where(last, 1.0, reveal), jnp.where(last, 0.0, sigma), s)


def _most(at: Moment) -> Array:
  """Returns the greatest legal sigma: min(1, (1 - alpha_s) / alpha_t)."""
  kept = jnp.maximum(1.0 - at.masked_t, 1e-9)
  return jnp.minimum(at.masked_s / kept, 1.0)


def _check_eta(eta: float) -> None:
  check.within("eta", eta, "[0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cap:
  """sigma = min(eta, (1 - alpha_s) / alpha_t); 0 is MDLM.

  Attributes:
    eta: in [0, 1].
  """

  eta: float = 0.04

  def __post_init__(self):
    _check_eta(self.eta)

  def __call__(self, at: Moment) -> Jump:
    """Returns the jump."""
    sigma = jnp.minimum(self.eta, _most(at))
    return remasking_jump(at.masked_t, at.masked_s, sigma, at.s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rescale:
  """sigma = eta min(1, (1 - alpha_s) / alpha_t); 0 is MDLM.

  Attributes:
    eta: in [0, 1].
  """

  eta: float = 0.04

  def __post_init__(self):
    _check_eta(self.eta)

  def __call__(self, at: Moment) -> Jump:
    """Returns the jump."""
    return remasking_jump(at.masked_t, at.masked_s, self.eta * _most(at), at.s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conf:
  """The greatest sigma, shared out among revealed slots: unsure ones get more.

  sigma_i = sigma_max softmax(memory)_i over the window.
  """

  def __call__(self, at: Moment) -> Jump:
    """Returns the jump."""
    known = at.memory > -jnp.inf
    top = jnp.max(jnp.where(known, at.memory, -jnp.inf), axis=1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weight = jnp.where(known, jnp.exp(at.memory - top), 0.0)
    share = weight / jnp.maximum(jnp.sum(weight, axis=1, keepdims=True), 1e-30)
    return remasking_jump(at.masked_t, at.masked_s, share * _most(at), at.s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
  """Reveals most slots, remasks for a while at one alpha, then finishes.

  Attributes:
    eta: sigma inside the loop.
    t_on: the time at which it is entered.
    t_off: the time at which it is left.
    alpha_on: the probability that a token is kept inside it.
  """

  eta: float = 0.02
  t_on: float = 0.55
  t_off: float = 0.05
  alpha_on: float = 0.9

  def __post_init__(self):
    _check_eta(self.eta)
    if not 0.0 < self.t_off < self.t_on < 1.0 or not 0 < self.alpha_on < 1:
      raise ValueError(
        "a remasking loop needs 0 < t_off < t_on < 1 and 0 < alpha_on < 1, not "
        f"t_off {self.t_off}, t_on {self.t_on}, alpha_on {self.alpha_on}"
      )

  def __call__(self, at: Moment) -> Jump:
    """Returns the jump."""
    before, after = at.t > self.t_on, at.t <= self.t_off

    def masked(t):
      rising = 1.0 - (1.0 - t) / (1.0 - self.t_on) * self.alpha_on
      ending = t * (1.0 - self.alpha_on) / self.t_off
      return jnp.where(before, rising, ending)

    zero = jnp.zeros_like(at.t)
    outside = remasking_jump(masked(at.t), masked(at.s), zero, at.s)
    last = at.s <= 0.0  # Of few steps the last may begin inside the loop.
    on = jnp.full_like(at.t, 1.0 - self.alpha_on)
    inside = remasking_jump(on, on, jnp.full_like(on, self.eta), at.s)
    return jax.tree.map(
      lambda a, b: jnp.where(before | after | last, a, b), outside, inside
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardBackward:
  """The corrector that noises as much as a step reveals (arXiv:2205.14987).

  sigma = (alpha_s - alpha_t) / alpha_t.
  """

  def __call__(self, at: Moment) -> Jump:
    """Returns the jump."""
    gained = at.masked_t - at.masked_s
    ratio = gained / jnp.maximum(1.0 - at.masked_t, 1e-9)
    sigma = jnp.minimum(ratio, _most(at))
    return remasking_jump(at.masked_t, at.masked_s, sigma, at.s)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowCorrector:
  """The corrector of discrete flow matching (arXiv:2407.15595, app. E).

  With a = scale t^power (1 - t)^power + 1 and b = a - 1, a masked slot is
  revealed a times as often as without it and a revealed one is masked with
  probability b (alpha_s / alpha_t - 1). Steps shorten where that would exceed 1.

  Attributes:
    scale: 10 as published.
    power: 1/4 as published.
  """

  scale: float = 10.0
  power: float = 0.25

  def __call__(self, at: Moment) -> Jump:
    """Returns the jump, with its own next time."""
    t = at.t
    a = self.scale * (t * jnp.maximum(1.0 - t, 0.0)) ** self.power + 1.0
    b = a - 1.0
    fit = 1.0 / (a / t + b / jnp.maximum(1.0 - t, 1e-9))
    dt = jnp.where(at.first, at.step, jnp.minimum(at.step, fit))
    s = jnp.where(at.s > 0.0, jnp.maximum(t - dt, 0.0), 0.0)
    # alpha is linear here: reveal a dt / t, remask b dt / (1 - t).
    reveal = jnp.where(s > 0.0, jnp.minimum(a * (t - s) / t, 1.0), 1.0)
    remask = b * (t - s) / jnp.maximum(1.0 - t, 1e-9)
    return Jump(reveal, jnp.where(s > 0.0, jnp.clip(remask, 0.0, 1.0), 0.0), s)


Rule = Cap | Rescale | Conf | Loop | ForwardBackward | FlowCorrector


@struct.dataclass
class Remembered(Progress):
  """Progress, with the time and what was revealed how surely.

  Attributes:
    t: the time.
    memory: see `Moment`.
  """

  t: Float[Array, "B 1"]
  memory: Float[Array, "B W"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReMDM(Stepwise):
  """Masked diffusion that masks tokens again (Wang et al. 2025).

  Attributes:
    rule: how likely slots are revealed and masked at each step.

  Examples:
    >>> from dllm_jax.objectives import MDLM
    >>> mdlm = MDLM(vocab_size=5, mask_id=4)
    >>> ReMDM(objective=mdlm, steps=8, rule=Cap(eta=0.1)).rule
    Cap(eta=0.1)
  """

  rule: Rule = Cap()

  idles = True

  def __post_init__(self):
    super().__post_init__()
    if not masks(self.objective):
      raise ValueError(
        "remasking needs a masked-diffusion objective (mdlm, md4, llada, dream, "
        f"bd3lm), not {type(self.objective).__name__}"
      )

  def init(self, process, z, window) -> Remembered:
    """Returns the state at a window's start."""
    base = super().init(process, z, window)
    return Remembered(
      **vars(base),
      t=self.times(base.step),
      memory=jnp.full(window.shape, -jnp.inf),
    )

  def time(self, state: Remembered) -> Float[Array, "B 1"]:
    """Returns each row's own time."""
    return state.t

  def done(self, process, z, state, window) -> Bool[Array, "B"]:
    """Returns rows that are out of steps: a full window may change again."""
    return (state.step >= self.steps) | ~jnp.any(window, axis=1)

  def moment(self, state: Remembered) -> Moment:
    """Returns where each row is."""
    t, s = state.t, self.times(state.step + 1)
    return Moment(
      t=t,
      s=s,
      masked_t=self.objective.masked(t),
      masked_s=jnp.where(s > 0.0, self.objective.masked(s), 0.0),
      memory=state.memory,
      first=state.step[:, None] == 0,
      step=1.0 / self.steps,
    )

  def step(
    self, process, noise, out, z, state, active, *,
    window=None, guide=None, rows=NONE, must=None,
  ):  # fmt: skip
    """Returns (z, state, info) after one network evaluation."""
    jump = self.rule(self.moment(state))
    mask_id = self.objective.mask_id
    reveal = jnp.broadcast_to(jump.reveal, z.shape)
    remask = jnp.broadcast_to(jump.remask, z.shape)

    def draw(logits, z, noise, reveal, remask, rows):
      read = self.filtered(logits, z, rows, guide)
      log_p = jax.nn.log_softmax(self.drawn(read, z, rows))
      log_q = posterior(log_p, z, reveal, remask, mask_id)
      token = noise.categorical(Tag.TOKEN, log_q)
      info = self.noted(self.law(read, z, rows), token)
      return token, confidence(log_p, token), info

    token, sure, info = reduce(
      draw, out, z, noise, reveal, remask, rows, window=window
    )
    token = jnp.where(active, token, z)
    fresh = (z == mask_id) & (token != mask_id)
    memory = jnp.where(fresh, -sure, state.memory)
    memory = jnp.where(token == mask_id, -jnp.inf, memory)
    # Slots that were given are never among those that remasking picks from.
    state = state.replace(step=state.step + 1, t=jump.s, memory=memory)
    return token, state, info


def masks(objective: Objective) -> bool:
  """Returns whether an objective masks all tokens by one schedule."""
  return hasattr(objective, "masked") and hasattr(objective, "schedule")


def posterior(
  log_p: Float[Array, "B c V"],
  z: Int[Array, "B c"],
  reveal: Float[Array, "B c"],
  remask: Float[Array, "B c"],
  mask_id: int,
) -> Float[Array, "B c V"]:
  """Returns log p(z_s | z_t) under given chances to reveal and to remask."""
  ids = jnp.arange(log_p.shape[-1])
  safe_log = lambda p: jnp.log(jnp.maximum(p, 0.0))
  is_mask = ids == mask_id
  hidden = jnp.where(
    is_mask,
    safe_log(1.0 - reveal)[..., None],
    safe_log(reveal)[..., None] + log_p,
  )
  shown = jnp.where(
    is_mask,
    safe_log(remask)[..., None],
    jnp.where(ids == z[..., None], safe_log(1.0 - remask)[..., None], -jnp.inf),
  )
  return jnp.where((z == mask_id)[..., None], hidden, shown)

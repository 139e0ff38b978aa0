r"""Policies for processes that replace tokens: Psi samplers, renoising.

`Psi` mixes the posterior with fresh noise, for any process; `Renoise` keeps
what is sure and draws the rest anew.
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
from dllm_jax.core.vocabulary import best, mean_embedding, reduce
from dllm_jax.sampling.policies.ancestral import Stepwise
from dllm_jax.sampling.policies.remasking import masks
from dllm_jax.sampling.policies.rows import NONE
from dllm_jax.sampling.policies.score import confidence, entropy, log_prob
from dllm_jax.sampling.policies.selection import bounded, Progress, rank, sort
from dllm_jax.sampling.window import where


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
      read = self.filtered(logits, z, rows, guide)
      logits = self.drawn(read, z, rows)
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
      law = log_q
      if rows.proposal is not None:
        law = self.law(read, z, rows)
      return token, self.noted(law, token)

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
  """Progress, and whether a row's canvas has come to rest.

  Attributes:
    best: the most probable tokens at the last call; -1 before the first.
    still: calls in a row, before the last, that had the same best tokens.
    settled: whether the row has stopped.
  """

  best: Int[Array, "B W"]
  still: Int[Array, "B"]
  settled: Bool[Array, "B"]


class _Seen(NamedTuple):
  """What a call says of each slot: two tokens, how likely, and their mean."""

  token: Int[Array, "B c"]
  best: Int[Array, "B c"]
  entropy: Float[Array, "B c"]
  of_token: dict[str, Array]
  of_best: dict[str, Array]
  said: Float[Array, "B c D"] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Renoise(Stepwise):
  r"""Keeps the surest drawn tokens of each call and draws all others anew.

  DiffusionGemma's sampler, as transformers 5.24.0 has it, for uniform processes.
  Of N calls the n-th divides the logits by

      T = cold + (hot - cold) (N - n + 1) / N,

  draws a token for each slot, and accepts those slots, in order of entropy, before
  which the entropies sum to no more than the bound. All others become uniform
  tokens. A row stops after N calls, or when its most probable tokens are those of
  the `stable` calls before and its mean entropy is below `rest`; what it then
  has are the most probable tokens of that call, and no drawn one. The next call is
  told what this one said (`Objective.self_conditioned`).

  Attributes:
    bound: nats.
    hot: the temperature at the first call.
    cold: the temperature that the last ones approach.
    rest: mean entropy, in nats, below which a stable row stops; 0 for never.
    stable: calls before, whose most probable tokens are compared; 0 for none.

  Examples:
    >>> from dllm_jax.objectives import UDLM
    >>> Renoise(objective=UDLM(vocab_size=4), steps=8, bound=0.2).bound
    0.2
  """

  bound: float = 0.1
  hot: float = 0.8
  cold: float = 0.4
  rest: float = 0.005
  stable: int = 1

  def __post_init__(self):
    super().__post_init__()
    vectors = hasattr(self.objective, "step_law")
    if self.objective.mask_id is not None or vectors:
      raise ValueError(
        "renoising draws uniform tokens: it needs a uniform process "
        "(diffusion_gemma, udlm), not "
        f"{type(self.objective).__name__}, which "
        f"{'moves vectors' if vectors else 'masks'}"
      )
    if not 0.0 < self.cold <= self.hot:
      raise ValueError(
        f"temperatures need 0 < cold <= hot, not {self.cold} and {self.hot}"
      )
    check.at_least(self, 0, "bound", "rest", "stable")

  @property
  def conditions(self) -> bool:
    """Whether a call is told what the one before it said."""
    return self.objective.self_conditioned

  def init(self, process, z, window) -> Settling:
    """Returns the state at a window's start."""
    base = super().init(process, z, window)
    rows = window.shape[:1]
    return Settling(
      **vars(base),
      best=jnp.full(window.shape, -1, jnp.int32),
      still=jnp.zeros(rows, jnp.int32),
      settled=jnp.zeros(rows, bool),
    )

  def done(self, process, z, state, window) -> Bool[Array, "B"]:
    """Returns rows that are out of steps or have come to rest."""
    return (state.step >= self.steps) | state.settled

  def step(
    self, process, noise, out, z, state, active, *,
    window=None, guide=None, rows=NONE, must=None,
  ):  # fmt: skip
    """Returns (z, state, info) after one network evaluation."""
    seen = self._seen(noise, out, z, state, window, guide, rows)
    order = rank(-seen.entropy, active)
    ranked = sort(jnp.where(active, seen.entropy, jnp.inf), order)
    count = jnp.sum(jnp.cumprod(bounded(ranked, self.bound), axis=1), axis=1)
    keep = active & (order < count[:, None])
    u = noise.uniform(Tag.REMASK, 1)[..., 0]
    random = jnp.floor(u * self.objective.vocab_size).astype(jnp.int32)

    same = jnp.all((seen.best == state.best) | ~active, axis=1)
    still = jnp.where(same, state.still + 1, 0)
    total = jnp.sum(jnp.where(active, seen.entropy, 0.0), axis=1)
    mean = total / jnp.maximum(jnp.sum(active, axis=1), 1)
    settled = (still >= self.stable) & (mean < self.rest)
    state = state.replace(
      step=state.step + 1, best=seen.best, still=still, settled=settled
    )
    over = self.done(process, z, state, active)[:, None]
    z = jnp.where(over, seen.best, jnp.where(keep, seen.token, random))
    info = where(over[:, 0], seen.of_best, seen.of_token)
    # What is drawn anew is uniform: of it too it is said how likely it was.
    even = -jnp.log(jnp.float32(self.objective.vocab_size))
    info["log_prob"] = jnp.where(over | keep, info["log_prob"], even)
    return z, state, info | ({"said": seen.said} if self.conditions else {})

  def heated(self, logits, state):
    """Returns logits at the temperature of each row's call."""
    left = (self.steps - state.step) / self.steps
    heat = self.cold + (self.hot - self.cold) * left
    return logits / heat[:, None, None]

  def _seen(self, noise, out, z, state, window, guide, rows) -> _Seen:
    mean = mean_embedding(out[0] if isinstance(out, tuple) else out)

    def look(logits, z, noise, rows):
      logits = self.heated(self.filtered(logits, z, rows, guide), state)
      token, law = self.token(logits, z, rows, noise)
      likeliest = best(rows.chosen(law))
      # One normalisation for all: each would be a pass over the vocabulary.
      log_p = jax.nn.log_softmax(law)

      def of(token):
        noted = self.noted(law, token, log_prob(log_p, token, log_sum=0.0))
        return noted | {"confidence": confidence(log_p, token, log_sum=0.0)}

      return _Seen(
        token=token,
        best=likeliest,
        entropy=entropy(law),
        of_token=of(token),
        of_best=of(likeliest),
        said=mean(jnp.exp(log_p)) if self.conditions else None,
      )

    # Half a chunk: one canvas's logits are never all there.
    return reduce(look, out, z, noise, rows, window=window, live=2)

"""Policies: which slots of a window are revealed after each network call.

Each is a frozen dataclass, static under jit, that meets `core.types.Policy` and
knows its objective and the number of steps in a window. State leaves are
`[B, ...]`: rows never see each other. Logits exist on chunks of positions only,
inside `reduce`; nothing here loops or clamps, which is the program's work.

Here are what all share and `Ancestral`; `unmasking` reveals by confidence or at
the process's jumps, `remasking` masks again, `renoising` draws anew.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dllm_jax.core.noise import Tag
from dllm_jax.core.types import Guide, ModelOutputs, Noise, Objective, Process
from dllm_jax.core.vocabulary import reduce
from dllm_jax.sampling.policies.processors import (
  Banned,
  compose,
  Counts,
  Forced,
  Logits,
  Processor,
  Temperature,
)
from dllm_jax.sampling.policies.selection import Progress

Outputs = ModelOutputs | tuple[ModelOutputs, ...]
Grid = Literal["objective", "uniform", "cosine"]
_FAINT = 200.0
"""Nats: e^-200 is 0 in float32, and differences of logits stay what they are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stepwise:
  """What policies share.

  Attributes:
    objective: the diffusion that the network was trained for.
    steps: network calls for each window, at most.
    filters: applied to the network's logits first, in this order; what they
      leave is what scores read.
    processors: applied after them, the mask token forbidden, to draw tokens.
  """

  objective: Objective
  steps: int
  filters: tuple[Processor, ...] = ()
  processors: tuple[Processor, ...] = ()

  forces = False
  idles = False
  stands = False
  extra = 0
  """Calls beyond `steps` that a revision may add."""

  def __post_init__(self):
    if self.steps < 1:
      raise ValueError(f"sampling needs at least 1 step, not {self.steps}")

  @property
  def counts(self) -> bool:
    """Whether a processor wants to know how often tokens stand in a row."""
    return any(p.counts for p in (*self.filters, *self.processors))

  def least_steps(self, width: int) -> int:
    """Returns the fewest steps that finish a window of so many slots."""
    return 1

  def init(
    self, process: Process, z: PyTree, window: Bool[Array, "B W"]
  ) -> Progress:
    """Returns the state at a window's start."""
    return Progress(
      step=jnp.zeros(window.shape[:1], jnp.int32),
      maskable=jnp.sum(
        self.masked(process, z, window), axis=1, dtype=jnp.int32
      ),
    )

  def masked(
    self, process: Process, z: PyTree, window: Bool[Array, "B W"]
  ) -> Bool[Array, "B W"]:
    """Returns the masked slots of a window; all without a mask token."""
    if self.objective.mask_id is None:
      return window
    tokens = self.objective.decode(process, z)
    return window & (tokens == self.objective.mask_id)

  def time(self, state: Progress) -> Float[Array, "B 1"]:
    """Returns the time that the network is told, from the grid."""
    return self.times(state.step)

  def done(
    self,
    process: Process,
    z: PyTree,
    state: Progress,
    window: Bool[Array, "B W"],
  ) -> Bool[Array, "B"]:
    """Returns rows that are out of steps, or have nothing masked."""
    over = state.step >= self.steps
    if self.objective.mask_id is None:
      return over
    return over | ~jnp.any(self.masked(process, z, window), axis=1)

  def grid(self) -> Float[Array, "steps+1"]:
    """Returns the times, from 1 down."""
    return self.objective.grid(self.steps)

  def times(self, step: Int[Array, "B"]) -> Float[Array, "B 1"]:
    """Returns the time before each row's step."""
    return jnp.take(self.grid(), step, mode="clip")[:, None]

  def filtered(
    self, logits: Any, z: PyTree, counts: Counts, guide: Guide | None
  ) -> Logits:
    """Returns what scores read: branches joined, then the filters.

    Where they leave the mask alone, which is never drawn, the legal tokens stay
    as the network has them, but with no probability to speak of.
    """
    if guide is not None:
      logits = guide(logits, z, None)
      most = jnp.finfo(logits.dtype).max  # of a guidance scale beyond measure
      logits = jnp.clip(logits, -most, most)
    read = compose(self.filters, logits, z, counts)
    if not self.filters or self.objective.mask_id is None:
      return read
    is_mask = jnp.arange(logits.shape[-1]) == self.objective.mask_id
    alone = ~jnp.any((read > -jnp.inf) & ~is_mask, axis=-1, keepdims=True)
    rules = [f for f in self.filters if isinstance(f, Banned | Forced)]
    faint = compose(rules, logits, z, counts) - _FAINT
    return jnp.where(alone & ~is_mask, faint, read)

  def drawn(self, logits: Logits, z: PyTree, counts: Counts) -> Logits:
    """Returns what tokens are drawn from, given filtered logits."""
    if self.objective.mask_id is not None:
      is_mask = jnp.arange(logits.shape[-1]) == self.objective.mask_id
      logits = jnp.where(is_mask, -jnp.inf, logits)
    return compose(self.processors, logits, z, counts)

  def token(
    self, logits: Logits, z: PyTree, counts: Counts, noise: Noise
  ) -> Int[Array, "B c"]:
    """Returns a draw from filtered logits.

    If the last processor leaves the best token alone, that is it: no need to
    draw it from a distribution.
    """
    *others, last = self.processors or (None,)
    if last != Temperature(0.0):
      return noise.categorical(Tag.TOKEN, self.drawn(logits, z, counts))
    legal = dataclasses.replace(self, processors=tuple(others))
    best = jnp.argmax(legal.drawn(logits, z, counts), axis=-1)
    return best.astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestral(Stepwise):
  """Draws z_s from p(z_s | z_t).

  The law of the reverse process itself, for any objective: where tokens are
  revealed is left to chance. Filters and processors act on the logits before
  the posterior. Under guidance, processes without a mask mix posteriors instead
  of logits, log q = (w + 1) log q_c - w log q_u (arXiv:2412.10193, eq. 9).

  Attributes:
    spacing: the grid of times: the objective's own, even ones, or
      cos(pi k / 2T), MD4's; the last is 0 in all of them.
  """

  spacing: Grid = "objective"

  idles = True

  def __post_init__(self):
    super().__post_init__()
    check_literal("spacing", self.spacing, ("objective", "uniform", "cosine"))

  def done(self, process, z, state, window) -> Bool[Array, "B"]:
    """Returns rows that are out of steps, or in which nothing can change."""
    if self.objective.replaces:
      return state.step >= self.steps
    return super().done(process, z, state, window)

  @property
  def stands(self) -> bool:
    """Whether what is revealed stays: a process that masks is never undone."""
    return self.objective.mask_id is not None and not self.objective.replaces

  def grid(self) -> Float[Array, "steps+1"]:
    """Returns the times, from 1 down."""
    if self.spacing == "objective":
      return self.objective.grid(self.steps)
    u = jnp.linspace(0.0, 1.0, self.steps + 1)
    t = 1.0 - u if self.spacing == "uniform" else jnp.cos(jnp.pi / 2.0 * u)
    return t.at[-1].set(0.0)

  def step(
    self,
    process: Process,
    noise: Noise,
    out: Outputs,
    z: PyTree,
    state: Progress,
    active: Bool[Array, "B W"],
    *,
    window: Int[Array, "B W"] | None = None,
    guide: Guide | None = None,
    counts: Counts = None,
    must: Bool[Array, "B W"] | None = None,
  ) -> tuple[PyTree, Progress, dict[str, Array]]:
    """Returns (z, state, info) after one network evaluation."""
    del active, must  # The program keeps the other slots.
    t, s = self.times(state.step), self.times(state.step + 1)
    after = state.replace(step=state.step + 1)
    if guide is not None and self.objective.mask_id is None:
      z = self._mixed(process, noise, out, z, t, s, window, guide, counts)
      return z, after, {}
    plain = guide is None and not (self.filters or self.processors)

    def guided(logits, z, t):
      logits = self.filtered(logits, z, counts, guide)
      return self.drawn(logits, z, counts)

    z = self.objective.reverse(
      process,
      noise,
      out,
      z,
      t,
      s,
      guide=None if plain else guided,
      window=window,
    )
    return z, after, {}

  def _mixed(self, process, noise, out, z, t, s, window, guide, counts):
    def draw(logits, z, t, s, noise):
      logits = tuple(
        self.drawn(self.filtered(x, z, counts, None), z, counts) for x in logits
      )
      log_q = tuple(
        self.objective.posterior(process, x, z, t, s) for x in logits
      )
      # -inf - (-inf) has no meaning: what neither branch reaches stays out.
      low = tuple(jnp.maximum(x, -1e9) for x in log_q)
      return noise.categorical(Tag.TOKEN, guide(low, z, t))

    return reduce(draw, out, z, t, s, noise, window=window)


def check_mask(policy: Stepwise) -> None:
  """Raises ValueError unless the objective has a mask."""
  if policy.objective.mask_id is None:
    raise ValueError(
      f"{type(policy).__name__} needs an objective with a mask token, which "
      f"{type(policy.objective).__name__} has not: use ancestral sampling"
    )


def check_literal(name: str, value: str, legal: tuple[str, ...]) -> None:
  """Raises ValueError unless the value is among the legal ones."""
  if value not in legal:
    raise ValueError(f"{name} must be one of {', '.join(legal)}, not {value!r}")

"""Policies: which slots of a window are revealed after each network call.

Each is a frozen dataclass, static under jit, that meets `policy.Policy` and
knows its objective and the number of steps in a window. State leaves are
`[B, ...]`: rows never see each other. Logits exist on chunks of positions only,
inside `reduce`; nothing here loops or clamps, which is the program's work.

Here are what all share and `Ancestral`; `unmasking` reveals by confidence or at
the process's jumps, `remasking` masks again, `renoising` draws anew.
"""

import dataclasses
from typing import Any, Literal

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dllm_jax.core.noise import Tag
from dllm_jax.core.types import (
  Guide,
  ModelOutputs,
  Noise,
  Objective,
  Process,
  Reading,
)
from dllm_jax.core.vocabulary import best, reduce
from dllm_jax.sampling.constraints.arrays import Followed
from dllm_jax.sampling.constraints.paths import weights
from dllm_jax.sampling.constraints.proposal import FAINT, softened
from dllm_jax.sampling.policies.policy import check_literal
from dllm_jax.sampling.policies.processors import (
  Banned,
  best_only,
  compose,
  Forced,
  Logits,
  Processor,
  Temperature,
)
from dllm_jax.sampling.policies.rows import NONE, Rows
from dllm_jax.sampling.policies.score import log_prob
from dllm_jax.sampling.policies.selection import Progress

Outputs = ModelOutputs | tuple[ModelOutputs, ...]
Grid = Literal["objective", "uniform", "cosine"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stepwise:
  """What policies share.

  Attributes:
    objective: the diffusion that the network was trained for.
    steps: network calls for each window, at most.
    filters: applied to the network's logits first, in this order; what they
      leave is what scores read.
    processors: applied after them, the mask token forbidden, to draw tokens.
    sharpens: whether scores read what rows' own temperatures and cuts leave;
      read where rows have options (`rows`) alone.
    top: how many of the likeliest tokens are noted of each draw.
  """

  objective: Objective
  steps: int
  filters: tuple[Processor, ...] = ()
  processors: tuple[Processor, ...] = ()
  sharpens: bool = False
  top: int = 0

  forces = False
  idles = False
  stands = False
  conditions = False
  resizes = False
  paces = False
  proposes = True
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
    masked = self.masked(process, z, window)
    return Progress(
      step=jnp.zeros(window.shape[:1], jnp.int32),
      maskable=jnp.sum(masked, axis=1, dtype=jnp.int32),
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
    self, logits: Any, z: PyTree, rows: Rows, guide: Guide | None
  ) -> Logits:
    """Returns what scores read: branches joined, then the filters.

    Where they leave the mask alone, which is never drawn, the legal tokens stay
    as the network has them, but with no probability to speak of.
    """
    if guide is not None:
      logits = guide(logits, z, None)
      most = jnp.finfo(logits.dtype).max  # of a guidance scale beyond measure
      logits = jnp.clip(logits, -most, most)
    filters = rows.fixed(self.filters)
    read = rows.adjusted(compose(filters, logits, z, rows.counts))
    sharpened = rows.options is not None and self.sharpens
    if sharpened:
      read = rows.shaped(read, greedy=True)
    if self.objective.mask_id is None or not (filters or sharpened):
      return read
    is_mask = jnp.arange(logits.shape[-1]) == self.objective.mask_id
    alone = ~jnp.any((read > -jnp.inf) & ~is_mask, axis=-1, keepdims=True)
    rules = [f for f in filters if isinstance(f, Banned | Forced)]
    faint = rows.adjusted(compose(rules, logits, z, rows.counts)) - FAINT
    return jnp.where(alone & ~is_mask, faint, read)

  def drawn(self, logits: Logits, z: PyTree, rows: Rows) -> Logits:
    """Returns what tokens are drawn from, given filtered logits.

    Of rows without temperature only the best token is left.
    """
    if rows.options is None and rows.proposal is None:
      return compose(self.processors, self._legal(logits), z, rows.counts)
    law = rows.chosen(self.law(logits, z, rows))
    if rows.options is None:
      return best_only(law) if self._greedy else law
    warm = rows.warm
    return lax.cond(
      jnp.all(warm),
      lambda x: x,
      lambda x: jnp.where(warm[..., None], x, best_only(x)),
      law,
    )

  def law(self, logits: Logits, z: PyTree, rows: Rows) -> Logits:
    """Returns what a draw's log-probability is of, given filtered logits.

    What tokens are drawn from; without temperature, where nothing is drawn, what
    the best token was the best of. Under a language, its marginal at the slot.
    """
    return rows.within(self._free_law(logits, z, rows), logits)

  def _free_law(self, logits: Logits, z: PyTree, rows: Rows) -> Logits:
    processors = rows.fixed(self.processors)
    if rows.options is None and self._greedy:
      processors = processors[:-1]
    logits = compose(processors, self._legal(logits), z, rows.counts)
    if rows.options is None or self.sharpens:
      return logits
    return rows.shaped(logits, greedy=False)

  def heated(self, logits: Logits, state: Any) -> Logits:
    """Returns logits at the temperature that a policy has of its own."""
    return logits

  def weigh(
    self,
    out: Outputs,
    z: PyTree,
    state: Any,
    languages: Followed,
    kinds: int,
    *,
    window: Int[Array, "B W"] | None,
    guide: Guide | None,
    rows: Rows,
  ) -> tuple[Float[Array, "B W C"], Float[Array, "B W C"]]:
    """Returns how likely the tokens of each class are, together and the best.

    Under the law that tokens would be drawn from without a language, in nats.
    """

    def look(logits, z, rows):
      read = self.filtered(logits, z, rows, guide)
      read = self.heated(read, state)
      law = softened(self._free_law(read, z, rows), read)
      return weights(law, languages, kinds)

    return reduce(look, out, z, rows, window=window)

  def takes_best(self, rows: Rows) -> bool | Bool[Array, "B"]:
    """Returns which rows take the most probable text, and draw none."""
    return self._greedy if rows.options is None else ~rows.warm[:, 0]

  @property
  def _greedy(self) -> bool:
    return self.processors[-1:] == (Temperature(0.0),)

  def _legal(self, logits: Logits) -> Logits:
    if self.objective.mask_id is None:
      return logits
    is_mask = jnp.arange(logits.shape[-1]) == self.objective.mask_id
    return jnp.where(is_mask, -jnp.inf, logits)

  def token(
    self, logits: Logits, z: PyTree, rows: Rows, noise: Noise
  ) -> tuple[Int[Array, "B c"], Logits]:
    """Returns a draw from filtered logits, and the law for `noted`.

    A batch in which every row takes its best token draws none from a
    distribution.
    """
    law = self.law(logits, z, rows)
    legal = rows.chosen(law)
    likeliest = lambda: best(legal)
    draw = lambda: noise.categorical(Tag.TOKEN, legal)
    if rows.options is None:
      token = likeliest() if self._greedy else draw()
    else:
      warm = rows.warm
      mixed = lambda: jnp.where(warm, draw(), likeliest())
      token = lax.cond(jnp.any(warm), mixed, likeliest)
    return token, law

  def noted(
    self,
    law: Logits,
    token: Int[Array, "B c"],
    likely: Float[Array, "B c"] | None = None,
  ) -> dict[str, Array]:
    """Returns what `info` says of draws: how likely they and the best were.

    Args:
      law: what was drawn from.
      token: what was drawn.
      likely: its log-probability, where that is known.
    """
    if self.objective.mask_id is not None:
      law = self._legal(law)
    noted = {"log_prob": log_prob(law, token) if likely is None else likely}
    if self.top:
      best, ids = lax.top_k(jax.nn.log_softmax(law), self.top)
      noted |= {"top_ids": ids, "top_log_probs": best}
    return noted


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

  Examples:
    >>> from dllm_jax.objectives import MDLM
    >>> mdlm = MDLM(vocab_size=5, mask_id=4)
    >>> policy = Ancestral(objective=mdlm, steps=2, spacing="uniform")
    >>> [float(t) for t in policy.grid()]
    [1.0, 0.5, 0.0]
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
    rows: Rows = NONE,
    must: Bool[Array, "B W"] | None = None,
  ) -> tuple[PyTree, Progress, dict[str, Array]]:
    """Returns (z, state, info) after one network evaluation."""
    del active, must  # The program keeps the other slots.
    t, s = self.times(state.step), self.times(state.step + 1)
    after = state.replace(step=state.step + 1)
    if guide is not None and self.objective.mask_id is None:
      z, info = self._mixed(process, noise, out, z, t, s, window, guide, rows)
      return z, after, info
    plain = guide is None and not (self.filters or self.processors)
    plain &= rows.options is None and rows.proposal is None

    def drawn(logits, z, t, rows):
      if plain:
        return logits
      return self.drawn(self.filtered(logits, z, rows, guide), z, rows)

    def note(logits, z, rows, log_q, token):
      return self.noted(self._law_of(log_q, logits, z, rows, guide), token)

    reading = Reading(rows, drawn, note)
    z, info = self.objective.reverse(
      process, noise, out, z, t, s, reading=reading, window=window
    )
    return z, after, info

  def _law_of(self, log_q, logits, z, rows, guide):
    """Returns what tokens were drawn from: q, but `law` without temperature.

    What replaces tokens draws in any case.
    """
    greedy = self._greedy if rows.options is None else ~rows.warm[..., None]
    if rows.proposal is not None:
      greedy = True
    elif greedy is False or self.objective.replaces:
      return log_q
    law = self.law(self.filtered(logits, z, rows, guide), z, rows)
    return jnp.where(greedy, law, log_q)

  def _mixed(self, process, noise, out, z, t, s, window, guide, rows):
    def draw(logits, z, t, s, noise, rows):
      logits = tuple(
        self.drawn(self.filtered(x, z, rows, None), z, rows) for x in logits
      )
      log_q = tuple(
        self.objective.posterior(process, x, z, t, s) for x in logits
      )
      # -inf - (-inf) has no meaning: what neither branch reaches stays out.
      low = tuple(jnp.maximum(x, -1e9) for x in log_q)
      mixed = guide(low, z, t)
      token = noise.categorical(Tag.TOKEN, mixed)
      return token, self.noted(mixed, token)

    return reduce(draw, out, z, t, s, noise, rows, window=window)

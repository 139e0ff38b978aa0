"""Gaps that grow and shrink while they are filled, as DreamOn fills them.

A gap's free slots are the room that it has. A few of them are in use at first,
and those alone are seen; a mask that becomes the expanding token becomes two
masks, one that becomes the deleting token goes. What is in use stands at the
gap's left, positions count it, and the rest holds the deleting token, which is no
text.
"""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from dllm_jax.core import check
from dllm_jax.core.vocabulary import reduce
from dllm_jax.sampling.policies.ancestral import Stepwise
from dllm_jax.sampling.policies.policy import check_literal, check_mask
from dllm_jax.sampling.policies.rows import NONE
from dllm_jax.sampling.policies.score import confidence, Score, score, SCORES
from dllm_jax.sampling.policies.selection import Progress, Seen


@struct.dataclass
class Course(Progress):
  """How far each row is.

  Attributes:
    live: slots in use.
    budget: expansions that are left.
    noted: what is noted of the token of each slot, which moves with it.
  """

  live: Bool[Array, "B W"]
  budget: Int[Array, "B"]
  noted: PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resizing(Stepwise):
  """Reveals the surest mask of each call, and grows and shrinks its gap.

  As the evaluation of DreamOn does (arXiv:2602.01326); in all of a row's gaps,
  each with its own room. A row expands as often as it has free slots, and no
  more often than the steps that are left can fill.

  Attributes:
    start: masks in use at first, in each gap.
    score: what ranks masks (`score.score`).
    ends: whether a deleting token makes all masks behind it such.
    deletes: whether deleting tokens go; else they stay, as ends of a text.
  """

  start: int = 4
  score: Score = "entropy"
  ends: bool = True
  deletes: bool = True

  resizes = True

  def __post_init__(self):
    super().__post_init__()
    check_mask(self)
    check.at_least(self, 1, "start")
    check_literal("score", self.score, SCORES)
    tokens = ("expand_id", "delete_id")
    if any(getattr(self.objective, name, None) is None for name in tokens):
      raise ValueError(
        "gaps grow and shrink by tokens of the network's (DreamOn): set"
        " objective.expand_id and objective.delete_id, or use preset dream"
      )

  def init(self, process, z, window) -> Course:
    """Returns the state at the start: a few slots of each gap are in use."""
    base = super().init(process, z, window)
    slots = jnp.arange(window.shape[1])
    noted = {"log_prob": jnp.zeros(window.shape)}
    if self.top:
      shape = (*window.shape, self.top)
      noted["top_ids"] = jnp.zeros(shape, jnp.int32)
      noted["top_log_probs"] = jnp.zeros(shape)
    return Course(
      **vars(base),
      live=window & (slots - _first(window) < self.start),
      budget=jnp.sum(window, axis=1, dtype=jnp.int32),
      noted=noted,
    )

  def live(self, state: Course) -> Bool[Array, "B W"]:
    """Returns the slots in use, of those that are sampled."""
    return state.live

  def done(self, process, z, state, window) -> Bool[Array, "B"]:
    """Returns rows that are out of steps, or have no mask in use."""
    left = self.masked(process, z, window) & state.live
    return (state.step >= self.steps) | ~jnp.any(left, axis=1)

  def step(
    self, process, noise, out, z, state, active, *,
    window=None, guide=None, rows=NONE, must=None,
  ):  # fmt: skip
    """Returns (z, state, info) after one network evaluation."""
    del must
    masked = self.masked(process, z, active) & state.live
    may = self._may_expand(masked, state, active)
    slot = jnp.broadcast_to(jnp.arange(z.shape[1]), z.shape)

    def draw(logits, z, noise, slot, may, rows):
      expand = jnp.arange(self.objective.vocab_size) == self.objective.expand_id
      stop = lambda x: jnp.where(expand & ~may[..., None], -jnp.inf, x)
      read = self.filtered(jax.tree.map(stop, logits), z, rows, guide)
      token, law = self.token(read, z, rows, noise)
      sure = confidence(read, token)
      ranks = score(self.score, read, sure, noise, slot)
      return token, sure, ranks, self.noted(law, token)

    token, sure, ranks, new = reduce(
      draw, out, z, noise, slot, may, rows, window=window
    )
    seen = Seen(candidates=masked, score=ranks, confidence=sure)
    chosen = seen.best(seen.due(state, self.steps))
    pick = lambda new, old: jax.vmap(jax.vmap(jnp.where))(chosen, new, old)
    noted = jax.tree.map(pick, new, state.noted)
    drawn = self._ended(jnp.where(chosen, token, z), masked, state, active)
    grow = chosen & (drawn == self.objective.expand_id)
    drop = masked & (drawn == self.objective.delete_id) & self.deletes
    moved = lambda x, fill: _moved(x, fill, state.live, grow, drop, active)
    after = jnp.where(grow, self.objective.mask_id, drawn)
    z = moved(after, self.objective.delete_id)
    state = state.replace(
      step=state.step + 1,
      live=moved(state.live, False),
      budget=state.budget - jnp.sum(grow, axis=1, dtype=jnp.int32),
      noted=jax.tree.map(lambda x: moved(x, 0), noted),
    )
    return z, state, state.noted | {"confidence": sure}

  def _may_expand(self, masked, state, active) -> Bool[Array, "B W"]:
    """Returns the slots whose gap has room, in rows with calls to fill it."""
    unused = active & ~state.live
    gap = jnp.where(active, _first(active), active.shape[1])
    room = jax.vmap(
      lambda unused, gap: (
        jnp.zeros((gap.shape[0] + 1,), int).at[gap].add(unused)
      )
    )(unused, gap)
    room = jnp.take_along_axis(room, gap, axis=1)
    left = jnp.sum(masked, axis=1)
    rest = self.steps - state.step - 1
    rows = (state.budget > 0) & (left + 1 <= rest)
    return (room > 0) & rows[:, None]

  def _ended(self, drawn, masked, state, active) -> Int[Array, "B W"]:
    """Returns the row in which what stands behind a deleting token is deleted."""
    if not self.ends:
      return drawn
    end = (drawn == self.objective.delete_id) & (~active | state.live)
    behind = jnp.cumsum(end, axis=1) > 0
    return jnp.where(masked & behind, self.objective.delete_id, drawn)


def _first(active: Bool[Array, "B W"]) -> Int[Array, "B W"]:
  """Returns where the gap of each slot begins."""
  slots = jnp.arange(active.shape[1])
  begins = active & ~jnp.pad(active[:, :-1], ((0, 0), (1, 0)))
  return jax.lax.cummax(jnp.where(begins, slots, 0), axis=1)


def _moved(x, fill, live, grow, drop, active):
  """Returns values of slots after some went and others became two.

  Args:
    x: values, `[B, W, ...]`; those of both halves of a slot are its own.
    fill: what slots out of use have.
    live: slots in use.
    grow: those that become two.
    drop: those that go.
    active: slots of gaps; the others stay as they are.
  """
  width = active.shape[1]
  live = active & live
  size = jnp.where(live, 1 + grow - drop, 0)
  before = jnp.cumsum(size, axis=1) - size
  first = _first(active)
  to = first + before - jnp.take_along_axis(before, first, axis=1)

  def row(x, live, grow, drop, active, to):
    shape = active.shape + (1,) * (x.ndim - 1)
    new = jnp.where(active.reshape(shape), jnp.asarray(fill, x.dtype), x)
    new = new.at[jnp.where(live & ~drop, to, width)].set(x, mode="drop")
    return new.at[jnp.where(grow, to + 1, width)].set(x, mode="drop")

  return jax.vmap(row)(x, live, grow, drop, active, to)

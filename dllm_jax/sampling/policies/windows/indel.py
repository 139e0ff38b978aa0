"""Editing blocks by deletion and insertion, as LLaDA2.2 is sampled by SGLang.

A block stays as long as it is: what a deleted token leaves is filled by masks at
the end, and what an inserted mask pushes past the end is lost. Masks that were
there from the start ("original") have to be decided; those that edits bring may
be. The released decoder is not known; this is SGLang's, whose budget of edits it
says to differ from it on purpose.
"""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.core import check
from dllm_jax.core.vocabulary import best, reduce
from dllm_jax.sampling.policies.ancestral import Stepwise
from dllm_jax.sampling.policies.policy import check_mask
from dllm_jax.sampling.policies.rows import NONE
from dllm_jax.sampling.policies.selection import Progress, rank


@struct.dataclass
class Course(Progress):
  """How far each row is in its block.

  Attributes:
    original: slots whose token was a mask from the start.
    post: calls that found none of them a mask.
    finished: whether the block is done.
    seen: the block at each call, -1 at calls to come.
    wrote: what each call wrote, -1 where it wrote nothing.
  """

  original: Bool[Array, "B W"]
  post: Int[Array, "B"]
  finished: Bool[Array, "B"]
  seen: Int[Array, "B S W"]
  wrote: Int[Array, "B W S"]


@struct.dataclass
class _Seen:
  """What the network says of each slot.

  Attributes:
    best: the likeliest token, and its probability.
    other: the likeliest that is no mask, and its probability.
    plain: the likeliest that is neither mask, deletion nor split.
    new: the likeliest that was not written there before.
  """

  best: tuple[Int[Array, "B W"], Float[Array, "B W"]]
  other: tuple[Int[Array, "B W"], Float[Array, "B W"]]
  plain: Int[Array, "B W"]
  new: Int[Array, "B W"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InDel(Stepwise):
  """Reveals, replaces, deletes and inserts, greedily (SGLang 0.5.23).

  Attributes:
    threshold: a probability above which masks are decided together.
    edit_threshold: one above which tokens are replaced, in [0, 1).
    post_steps: calls without an original mask, after which a last one decides
      all; 0: the one that decides the last original mask does.
  """

  threshold: float = 0.5
  edit_threshold: float = 0.0
  post_steps: int = 16

  proposes = False

  def __post_init__(self):
    super().__post_init__()
    check_mask(self)
    check.within("a confidence threshold", self.threshold, "(0, 1]")
    check.within("the editing threshold", self.edit_threshold, "[0, 1)")
    check.at_least(self, 0, "post_steps")
    tokens = ("delete_id", "split_id")
    if any(getattr(self.objective, name, None) is None for name in tokens):
      raise ValueError(
        "deleting and inserting needs a network with tokens for it (LLaDA2.2):"
        " set objective.delete_id and objective.split_id, or use preset llada2"
      )

  @property
  def extra(self) -> int:
    """Calls beyond `steps` that edits may take."""
    return self.post_steps + 1

  def init(self, process, z, window) -> Course:
    """Returns the state at a block's start."""
    base = super().init(process, z, window)
    rows, width = window.shape
    calls = width + self.post_steps + 1
    return Course(
      **vars(base),
      original=self.masked(process, z, window),
      post=jnp.zeros((rows,), jnp.int32),
      finished=jnp.zeros((rows,), bool),
      seen=jnp.full((rows, calls, width), -1, jnp.int32),
      wrote=jnp.full((rows, width, calls), -1, jnp.int32),
    )

  def done(self, process, z, state, window) -> Bool[Array, "B"]:
    """Returns the rows whose block is done, or was full from the start."""
    return state.finished | (state.maskable == 0)

  def _look(self, out, z, state, original, window, guide, rows) -> _Seen:
    """Returns what the network says, on chunks of slots."""
    objective = self.objective
    plain = (objective.mask_id, objective.delete_id, objective.split_id)

    def look(logits, z, original, wrote, rows):
      logits = self.filtered(logits, z, rows, guide)
      p, ids = jax.nn.softmax(logits), jnp.arange(logits.shape[-1])
      but = lambda x, *tokens: jnp.where(
        jnp.isin(ids, jnp.array(tokens)), -jnp.inf, x
      )
      pick = lambda token: jnp.take_along_axis(p, token[..., None], -1)[..., 0]
      first, other = best(logits), best(but(logits, objective.mask_id))
      strike = lambda x, ids: x.at[ids].set(-jnp.inf, mode="drop")
      past = jnp.where(wrote < 0, logits.shape[-1], wrote)
      unseen = jax.vmap(jax.vmap(strike))(logits, past)
      no_mask = but(unseen, objective.mask_id)
      unseen = jnp.where(original[..., None], no_mask, unseen)
      return _Seen(
        best=(first, pick(first)),
        other=(other, pick(other)),
        plain=best(but(logits, *plain)),
        new=best(unseen),
      )

    return reduce(look, out, z, original, state.wrote, rows, window=window)

  def step(
    self, process, noise, out, z, state, active, *,
    window=None, guide=None, rows=NONE, must=None,
  ):  # fmt: skip
    """Returns (z, state, info) after one network evaluation."""
    del noise, must  # Nothing is drawn.
    masked = self.masked(process, z, active)
    original = masked & state.original
    said = self._look(out, z, state, original, window, guide, rows)
    left = jnp.any(original, axis=1)
    post = state.post + ~left
    limit = self.steps + self.post_steps
    final = state.step + 1 > limit
    final |= (post >= self.post_steps) if self.post_steps else ~left

    token, sure = said.best
    stays = original & (token == self.objective.mask_id) & ~final[:, None]
    token = jnp.where(stays, said.other[0], token)
    sure = jnp.where(stays, said.other[1], sure)
    reveal, final = self._revealed(masked, original, sure, final)
    edit = active & ~masked & (sure > self.edit_threshold) & (token != z)
    write = reveal | edit
    idle = ~jnp.any(write, axis=1)

    drop = (self.objective.mask_id, self.objective.delete_id)
    drop = jnp.array((*drop, self.objective.split_id))
    clean = final[:, None] & jnp.isin(token, drop)
    token = jnp.where(clean, said.plain, token)
    again = jnp.any(jnp.all(state.seen == z[:, None], axis=2), axis=1) & ~final
    changing = write & (token != z)
    doubt = jnp.where(changing, sure, jnp.inf)
    worst = changing & (jnp.arange(z.shape[1]) == jnp.argmin(doubt, 1)[:, None])
    token = jnp.where(worst & again[:, None], said.new, token)

    call = jnp.arange(state.seen.shape[1])
    now = (call == state.step[:, None]) & ~idle[:, None]
    wrote = jnp.where(write, token, -1)
    new_z, moved = self._rebuilt(
      z, jnp.where(write, token, z), state.original, active
    )
    state = state.replace(
      step=state.step + 1,
      original=moved,
      post=post,
      finished=state.finished | idle | final,
      seen=jnp.where(now[:, :, None], z[:, None], state.seen),
      wrote=jnp.where(now[:, None], wrote[..., None], state.wrote),
    )
    zeros = jnp.zeros_like(sure)
    log_prob = jnp.where(sure > 0.0, jnp.log(sure), zeros)
    return new_z, state, {"confidence": sure, "log_prob": log_prob}

  def _revealed(self, masked, original, sure, final):
    """Returns the masks that are decided now, and the rows that end with it."""
    left = jnp.any(original, axis=1)
    count = lambda slots: jnp.sum(slots, axis=1, dtype=jnp.int32)
    need = 1 + count(masked) - count(original)
    surer = masked & (sure > self.threshold)
    best = masked & (rank(sure, masked) < need[:, None])
    some = jnp.where((count(surer) >= need)[:, None], surer, best)
    reveal = jnp.where((final | ~left)[:, None], masked, some)
    if not self.post_steps:
      final |= left & ~jnp.any(original & ~reveal, axis=1)
      reveal = jnp.where(final[:, None], masked, reveal)
    return reveal, final

  def _rebuilt(self, old, new, original, active):
    """Returns the block after deletions and splits, and where masks went."""
    mask_id, width = self.objective.mask_id, old.shape[1]
    gone = active & (new == self.objective.delete_id)
    split = active & (new == self.objective.split_id)

    def row(old, new, original, active, gone, split):
      slots = jnp.argsort(~active, stable=True)  # those that may change, first
      room = jnp.sum(active)
      size = jnp.where(active, 1 + split - gone, 0)
      start = jnp.cumsum(size) - size
      to = lambda at, here: jnp.where(
        here & (at < room), slots[jnp.minimum(at, width - 1)], width
      )
      kept = to(start, active & ~gone)
      pushed = to(start + 1, split)
      tokens = jnp.where(active, mask_id, old)
      tokens = tokens.at[kept].set(jnp.where(split, mask_id, new), mode="drop")
      tokens = tokens.at[pushed].set(old, mode="drop")
      flags = jnp.where(active, False, original)
      flags = flags.at[kept].set(original & ~split, mode="drop")
      flags = flags.at[pushed].set(original, mode="drop")
      return tokens, flags

    return jax.vmap(row)(old, new, original, active, gone, split)

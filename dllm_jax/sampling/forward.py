"""The network as the sampler calls it: on the canvas or on a window of it.

Caches are explicit pytrees with a slot for each canvas slot. What is recomputed
at a network call, with S the start of a row's block and W its length:

    none     canvas     [0, T)                 nothing is kept
    prefix   suffix     [S, S + reach)         keys and values before S are kept
    dual     block      [S, S + W)             those on both sides are kept
    block    block      [S, S + W)             exact: nothing after it is seen

Where blocks open (`Objective.opens`) a block's first call is that of the block
before it, [S - W, S), which stores that and has the first token.

Prefix and dual caches (Fast-dLLM, arXiv:2505.22618) are approximations for
bidirectional networks, refreshed by a pass over the canvas when a block is
entered, and every `refresh` calls. The block cache is that of block-causal
networks; for bidirectional ones, slots after a block hidden (`extend`), it keeps
a prompt and finished blocks as they were read when they were the end. Guidance
doubles the rows and nothing else.

Two shapes of the network are compiled, the canvas and what is recomputed, of
which the latter is as wide for every block. A suffix is thus as wide as the
widest, `reach`: all T slots, and no work is saved, unless the caller says how
many follow a prompt at most. Slots beyond it keep what the last refresh made of
them, as all those after the block do under a dual cache.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dllm_jax.core.axes import BATCH_AXES, constrain, TENSOR
from dllm_jax.core.mask import BlockCausal, Full, MaskSpec
from dllm_jax.core.types import (
  Batch,
  Denoiser,
  KVCache,
  ModelOutputs,
  Objective,
  Process,
)
from dllm_jax.core.vocabulary import cast_unembedding, vocab_width
from dllm_jax.sampling.policies.guidance import Guidance
from dllm_jax.sampling.window import gather, Window

CacheKind = Literal["none", "prefix", "dual", "block"]
CACHES = ("none", "prefix", "dual", "block")

Outputs = ModelOutputs | tuple[ModelOutputs, ...]


class Network(NamedTuple):
  """A network with its parameters and the batch that it samples.

  Attributes:
    batch: the requests as the objective's `inputs` wants them.
    cache: what is kept between calls.
    refresh: calls between passes over the canvas inside a block; 0 for one at
      its entry only.
    block: slots of a block, or of a call that drafts; None for the canvas.
    reach: slots from a block's start that a prefix cache recomputes; None for
      as many as the canvas has.
    guidance: how two branches are joined, or None.
    resizes: whether positions count the slots that are seen alone.
  """

  denoiser: Denoiser
  params: PyTree
  process: Process
  objective: Objective
  batch: Batch
  cache: CacheKind
  refresh: int
  block: int | None
  reach: int | None
  guidance: Guidance | None
  resizes: bool = False

  @property
  def approximate(self) -> bool:
    """Whether kept keys and values are those of an older canvas."""
    return self.cache in ("prefix", "dual")

  @property
  def enters(self) -> bool:
    """Whether a block's first call is another than those that follow."""
    return self.approximate or self.objective.opens

  @property
  def first_alone(self) -> bool:
    """Whether that call fills the block's first slot, and no other."""
    shifted = self.approximate and self.objective.shift > 0
    return shifted or self.objective.opens

  @property
  def lead(self) -> int:
    """How far the window of a call lies before its block."""
    return 0 if self.enters else self.objective.shift

  @property
  def stores(self) -> bool:
    """Whether a finished block needs one more call, to be kept."""
    exact = self.cache == "block" and self.objective.shift == 0
    return exact and not (self.objective.opens or self.objective.two_passes)

  @property
  def wide(self) -> int:
    """Slots that a call with a cache recomputes, some past the canvas's end."""
    length = self.batch.tokens.shape[1]
    return (self.reach or length) if self.cache == "prefix" else self.block

  def empty(self) -> KVCache | None:
    """Returns a cache for all rows, sharded like the model.

    Windows may end past the canvas; one that is a canvas wide needs no room, but
    of an exact cache, where rows are read behind it, too (`speculation`).
    """
    if self.cache == "none":
      return None
    rows, slots = self.batch.tokens.shape
    rows *= 1 if self.guidance is None else 2
    whole = self.wide == slots and self.cache != "block"
    room = 0 if whole else self.wide
    cache = self.denoiser.cache(rows, slots + room)
    heads = lambda x: constrain(x, None, BATCH_AXES, TENSOR, None, None)
    segments = cache.segment_ids[:, :slots]
    return cache.replace(
      key=jax.tree.map(heads, cache.key),
      value=jax.tree.map(heads, cache.value),
      segment_ids=constrain(segments, BATCH_AXES, None),
    )

  def head(self) -> ModelOutputs:
    """Returns outputs of no use but for their unembedding, cast, and bias.

    Both branches of a condition would copy the unembedding at each step;
    nothing of the network itself is left of this call once it is compiled.
    """
    z = self.objective.clean(self.process, self.batch.tokens)
    t = jnp.zeros((self.batch.tokens.shape[0], 1))
    inputs = self.objective.inputs(self.process, z, t, self.batch)
    out, _ = self.denoiser.apply(self.params, inputs, None)
    return cast_unembedding(self._cut(out.replace(aux={})))

  def look(
    self,
    z: PyTree,
    t: Float[Array, "B 1"],
    window: Window,
    visible: Bool[Array, "B T"],
    cache: KVCache | None,
    fresh: bool,
    said: Float[Array, "B W D"] | None = None,
  ) -> tuple[Float[Array, "R Q D"], KVCache | None]:
    """Returns hidden states that predict a window, for `outputs`, and the cache.

    Args:
      z: the canvas.
      t: the time that each row is at.
      window: what is worked on.
      visible: slots that may be seen now.
      cache: what was kept.
      fresh: whether an approximate cache is made anew, by a pass over the canvas,
        or a block is opened, by one over the block before it.
      said: what the network last said of the window, where it is told that.
    """
    if self.cache == "none":
      t = self._times(t, window)
      return self._canvas(z, t, visible, None)[0].hidden, None
    if fresh and self.objective.opens:
      return self._opened(z, window, visible, cache)
    if fresh:
      return self._refreshed(z, t, window, visible, cache)
    return self._part(z, t, window, visible, cache, said)

  def nothing(self, head: ModelOutputs) -> Float[Array, "R T D"]:
    """Returns what `look` gives without a cache, all zeros."""
    return self.doubled(jnp.zeros_like(head.hidden))

  def outputs(
    self, hidden: Float[Array, "R Q D"], window: Window, head: ModelOutputs
  ) -> tuple[Outputs, Int[Array, "B W"] | None]:
    """Returns what predicts a window, of each branch, and where in it."""
    index = window.hidden if self.cache == "none" else None
    if self.guidance is None:
      return outputs_of(head, hidden), index
    branches = jnp.split(hidden, 2)
    return tuple(outputs_of(head, h) for h in branches), index

  def prefill(
    self, z: PyTree, visible: Bool[Array, "B T"], cache: KVCache
  ) -> KVCache:
    """Returns the cache of the canvas as it is, seen as clean.

    Of two passes, the causal one reads prompts in pieces as long as a block: what
    it makes of a piece is in memory at once.
    """
    if self.objective.two_passes:
      rows, length = visible.shape
      ends = jnp.where(visible & self.given, jnp.arange(length) + 1, 0)
      piece = lambda i, cache: self.fill(
        z, visible, cache, jnp.full(rows, i * self.block), self.block
      )
      if length <= self.block:
        return piece(0, cache)
      pieces = -(-jnp.max(ends) // self.block)
      return jax.lax.fori_loop(0, pieces, piece, cache)
    if isinstance(self._stored or self.objective.mask_spec, Full):
      visible &= self.given  # A prompt sees itself alone.
    t = jnp.zeros((visible.shape[0], 1))
    return self._canvas(z, t, visible, cache, self._stored)[1]

  @property
  def _stored(self) -> MaskSpec | None:
    """Who sees whom where tokens are stored; None for as always."""
    return self.objective.stored_spec if self.objective.opens else None

  def fill(
    self,
    z: PyTree,
    visible: Bool[Array, "B T"],
    cache: KVCache,
    start: Int[Array, "B"],
    width: int,
  ) -> KVCache:
    """Returns an exact cache with so many slots more, from a start on, as clean."""
    if self.objective.two_passes:
      slots = start[:, None] + jnp.arange(width)
      seen = gather(visible & self.given, slots)
      seen &= slots < visible.shape[1]
      return self.read(gather(z, slots), slots, seen, cache)
    t = jnp.zeros((visible.shape[0], 1))
    return self.at(z, t, start, width, visible, cache, self._stored)[1]

  @property
  def given(self) -> Bool[Array, "B T"]:
    """The slots before the first that is sampled."""
    return jnp.cumprod(~self.batch.loss_mask, axis=1) > 0

  def read(
    self,
    z: PyTree,
    slots: Int[Array, "B W"],
    visible: Bool[Array, "B W"],
    cache: KVCache,
  ) -> KVCache:
    """Returns the cache after the causal pass over some finished slots.

    Args:
      z: their tokens.
      slots: where they are.
      visible: which of them count.
      cache: what was read before.
    """
    batch = gather(self.batch.replace(cond=None), slots)
    batch = batch.replace(
      segment_ids=visible.astype(jnp.int32),
      positions=slots,
      cond=self.batch.cond,
    )
    cache = cache.replace(segment_ids=self.doubled(self.batch.segment_ids))
    return self._apply(z, None, batch, slots[:, 0], cache)[1]

  def finish(
    self, z: PyTree, window: Window, rows: Bool[Array, "B"], cache: KVCache
  ) -> KVCache:
    """Returns the cache after the causal pass over some rows' finished blocks.

    A loop of one round and not a condition, for which the cache would be copied.
    """
    seen = gather(self.batch.segment_ids > 0, window.slots) & rows[:, None]
    seen &= window.slots < self.batch.tokens.shape[1]
    z = gather(z, window.slots)
    body = lambda carry: (
      jnp.array(False),
      self.read(z, window.slots, seen, carry[1]),
    )
    some = jnp.any(rows)
    return jax.lax.while_loop(lambda carry: carry[0], body, (some, cache))[1]

  def _times(self, t, window):
    """Returns t for the block, 0 for clean ones, if blocks have own times."""
    objective = self.objective
    causal = isinstance(objective.mask_spec, BlockCausal)
    if window.whole or not causal or not objective.reads_time:
      return t
    slots = self.batch.positions
    end = window.start[:, None] + window.slots.shape[1]
    inside = (slots >= window.start[:, None]) & (slots < end)
    return jnp.where(inside, t, 0.0)

  def _canvas(self, z, t, visible, cache, spec=None):
    batch = self.batch.replace(segment_ids=visible.astype(jnp.int32))
    if self.resizes:
      seen = jnp.cumsum(batch.segment_ids, axis=1)
      batch = batch.replace(positions=jnp.maximum(seen - 1, 0))
    return self._apply(z, t, batch, None, cache, spec)

  def _refreshed(self, z, t, window, visible, cache):
    out, cache = self._canvas(z, t, visible, cache)
    slots = window.slots - self.objective.shift
    return gather(out.hidden, self.doubled(slots)), cache

  def _opened(self, z, window, visible, cache):
    """Stores the block before a window; returns what predicts its first slot."""
    start = jnp.maximum(window.start - self.wide, 0)
    t = jnp.zeros((visible.shape[0], 1))
    spec, wide = self._stored, self.wide
    out, cache = self.at(z, t, start, wide, visible, cache, spec)
    at = self.doubled(window.slots - 1 - start[:, None])
    return gather(out.hidden, at), cache

  def _part(self, z, t, window, visible, cache, said):
    """Calls the network on the window alone, or on all slots from it on."""
    width = window.slots.shape[1]
    start = jnp.maximum(window.start - self.lead, 0)
    wide = self.wide
    out, cache = self.at(z, t, start, wide, visible, cache, said=said)
    # Slot j of the window is predicted `shift` before it, 0 at the least.
    at = jnp.arange(width) - self.objective.shift + self.lead
    return out.hidden[:, jnp.maximum(at, 0)], cache

  def at(
    self, z, t, start, width, visible, cache, spec=None, said=None, tree=None
  ):
    """Calls the network on so many slots of each row, from a start on.

    `spec` says who sees whom, where that is not as always, and `tree` besides
    where slots stand; `said` is as in `look`.
    """
    slots = start[:, None] + jnp.arange(width)
    batch = gather(self.batch.replace(cond=None), slots)
    seen = gather(visible, slots) & (slots < visible.shape[1])
    batch = batch.replace(
      segment_ids=seen.astype(jnp.int32),
      positions=slots if tree is None else start[:, None] + tree.ahead,
      cond=self.batch.cond,
    )
    cache = cache.replace(segment_ids=self.doubled(visible.astype(jnp.int32)))
    z = gather(z, slots)
    sees = None if tree is None else jnp.asarray(tree.sees)
    return self._apply(z, t, batch, start, cache, spec, said, sees)

  def _apply(self, z, t, batch, start, cache, spec=None, said=None, sees=None):
    """Returns outputs and cache; without a time, of a causal pass over text."""
    if self.guidance is not None:
      fixed = (batch.segment_ids > 0) & ~batch.loss_mask
      z = self.guidance.latent(self.objective, z, fixed)
      cond = self.guidance.cond(batch.cond)
      segments = self.guidance.segments(batch.segment_ids)
      batch = jax.tree.map(self.doubled, batch.replace(cond=None))
      batch = batch.replace(cond=cond, segment_ids=segments)
      t = jax.tree.map(self.doubled, t)
    if t is None:
      inputs = self.objective.text_inputs(self.process, z, batch)
    else:
      inputs = self.objective.inputs(self.process, z, t, batch)
    if spec is not None:
      inputs = inputs.replace(mask=spec)
    if sees is not None:
      sees = jnp.broadcast_to(sees, (*z.shape[:1], *sees.shape))
      inputs = inputs.replace(extra_mask=sees)
    if start is not None:
      inputs = inputs.replace(slot=self.doubled(start))
      if inputs.extra_mask is not None:
        extra = _over_cache(inputs.extra_mask, inputs.slot, cache)
        inputs = inputs.replace(extra_mask=extra)
    if said is not None:
      inputs = inputs.replace(self_conditioning=self.doubled(said))
    return self.denoiser.apply(self.params, inputs, cache)

  def doubled(self, x: Array) -> Array:
    """Returns x for the rows of both branches of guidance."""
    return x if self.guidance is None else jnp.concatenate([x, x])

  def _cut(self, out: ModelOutputs) -> ModelOutputs:
    """Returns outputs without columns that only pad."""
    if out.vocab_size is None and vocab_width(out) > self.objective.vocab_size:
      return out.replace(vocab_size=self.objective.vocab_size)
    return out


def outputs_of(head: ModelOutputs, hidden: Array) -> ModelOutputs:
  """Returns what hidden states say under a head, in the type that it has."""
  if head.unembed is not None:
    hidden = hidden.astype(head.unembed.dtype)
  return head.replace(hidden=hidden)


def _over_cache(extra, start, cache: KVCache) -> Bool[Array, "R W S"]:
  """Returns a window's own mask over a cache, all of what lies outside seen."""
  width = extra.shape[1]
  at = jnp.arange(cache.segment_ids.shape[1]) - start[:, None]
  inside = (at >= 0) & (at < width)
  at = jnp.broadcast_to(
    jnp.clip(at, 0, width - 1)[:, None], (*extra.shape[:2], at.shape[1])
  )
  return jnp.take_along_axis(extra, at, axis=2) | ~inside[:, None]

"""A step of the sampling program: what rows are, and one call of the network.

A row begins (`started`), enters a block (`entered`), takes steps in it (`step`),
each one call of the network and what the policy makes of it, and leaves it
(`left`). Which rows do so when is another's business: `loop` has all rows of a
batch wait for each other, an engine (`serving.slots`) has each at its own place.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dllm_jax.core.types import KVCache, ModelOutputs, Noise, Process
from dllm_jax.sampling.constraints.follow import begun, passed, Place, proposed
from dllm_jax.sampling.forward import Network
from dllm_jax.sampling.options import known
from dllm_jax.sampling.policies.rows import Rows
from dllm_jax.sampling.requests import Requests
from dllm_jax.sampling.sampler import Sampler
from dllm_jax.sampling.speculation import parts
from dllm_jax.sampling.traces.trace import Frame, observe
from dllm_jax.sampling.window import put, spread, take, where, Window

NoiseAt = Callable[[Int[Array, "B"], Int[Array, "B W"]], Noise]
"""`(each row's own step, slots) -> noise` of a step."""

IDLE, _STORING, RUNNING = 0, 1, 2


@struct.dataclass
class Canvas:
  """What goes from step to step.

  Attributes:
    z: the latent, leaves `[B, T, ...]`.
    hidden: what the network last made of it, where that is kept.
    changed: rows whose latent is another one since then.
    step: each row's own count of the policy's steps.
    calls: each row's count of network calls.
    stopped: rows that have drawn their end of text.
    stage: what each row does in this block: idle, storing or running.
    block: the block that each row is in, or comes to next.
    call: each row's count of network calls since it was entered.
    revealed_at: the step at which each slot took its token; -1 where it has
      taken none.
    log_prob: of that token at that step, nats; 0 where it has taken none.
    top_ids: the likeliest tokens of that step, if they are kept; else None.
    top_log_probs: how likely they were.
    cache: kept keys and values, or None.
    state: the policy's, inside a block.
    sound: rows of whose hidden states all were numbers; None where nobody asks.
    said: what the network last said of the block, where it is told that.
    place: where rows are in their languages; None without.
  """

  z: PyTree
  step: Int[Array, "B"]
  calls: Int[Array, "B"]
  stopped: Bool[Array, "B"]
  stage: Int[Array, "B"]
  block: Int[Array, "B"]
  call: Int[Array, "B"]
  revealed_at: Int[Array, "B T"]
  log_prob: Float[Array, "B T"]
  top_ids: Int[Array, "B T k"] | None = None
  top_log_probs: Float[Array, "B T k"] | None = None
  cache: KVCache | None = None
  state: PyTree = None
  hidden: Float[Array, "R T D"] | None = None
  changed: Bool[Array, "B"] | None = None
  sound: Bool[Array, "B"] | None = None
  said: Float[Array, "B W D"] | None = None
  place: Place | None = None


class Run(NamedTuple):
  """What stays the same during a generation; arguments as in `generate`.

  Attributes:
    network: the network on the requests.
    head: outputs that only carry the unembedding.
  """

  sampler: Sampler
  network: Network
  head: ModelOutputs
  requests: Requests
  noise: NoiseAt
  trace: bool

  @property
  def process(self) -> Process:
    """Returns the arrays of the objective."""
    return self.network.process

  @property
  def keeps(self) -> bool:
    """Whether the network is left alone while no row changes.

    MDLM's shortcut (arXiv:2406.07524, sec. 3.5): at an unchanged latent a
    network that is not told the time says what it said.
    """
    objective, policy = self.sampler.objective, self.sampler.policy
    still = policy.idles and not objective.reads_time
    return still and self.sampler.cache == "none"

  @property
  def free(self) -> Bool[Array, "B T"]:
    """Returns True at slots to be sampled."""
    return self.network.batch.loss_mask

  @property
  def ends(self) -> Int[Array, "B E"] | None:
    """Returns what ends each row; None where nothing does."""
    if self.requests.options is not None:
      return self.requests.options.end_ids
    ends = jnp.asarray(self.sampler.end_ids, jnp.int32)
    return jnp.tile(ends, (self.free.shape[0], 1)) if ends.size else None

  def ended(self, tokens: Int[Array, "B W"]) -> Bool[Array, "B W"]:
    """Returns which tokens end their row."""
    return jnp.any(tokens[..., None] == self.ends[:, None], axis=-1)

  def rows(self, z: PyTree, window: Window) -> Rows:
    """Returns what the policy gets to know of the rows, in a window."""
    tokens = self.sampler.objective.decode(self.process, z)
    return known(self.requests, self.sampler.policy, tokens, self.free, window)

  def first(self, k: Int[Array, "B"]) -> Int[Array, "B"]:
    """Returns where block k of each row begins."""
    width = self.sampler.block_length or self.sampler.length
    fixed = self.requests.fixed.astype(jnp.int32)
    prompt = jnp.sum(jnp.cumprod(fixed, axis=1), axis=1)
    if self.sampler.blocks_from == "start":
      prompt = prompt // width * width
    return prompt + k * width

  def window(self, canvas: Canvas) -> Window:
    """Returns the block of each row, nothing of it active in stopped rows."""
    window = self.block(canvas.block)
    active = window.active & ~canvas.stopped[:, None]
    return window._replace(active=active)

  def block(self, k: Int[Array, "B"]) -> Window:
    """Returns block k of each row, at the row's own pointer."""
    length, width = self.sampler.length, self.sampler.block_length
    shift = self.sampler.objective.shift
    if width is None:
      slots = jnp.broadcast_to(jnp.arange(length), self.free.shape)
      return Window(slots, self.free, slots - shift if shift else None, True)
    slots = self.first(k)[:, None] + jnp.arange(width)
    inside = jnp.minimum(slots, length - 1)
    active = jnp.take_along_axis(self.free, inside, axis=1) & (slots < length)
    return Window(slots, active, jnp.maximum(inside - shift, 0), False)

  def visible(self, window: Window) -> Bool[Array, "B T"]:
    """Returns the slots that may be seen while a window is worked on."""
    seen = self.requests.valid
    slots = self.network.batch.positions
    end = window.start[:, None] + window.slots.shape[1]
    sampler = self.sampler
    if sampler.extend or sampler.objective.opens or sampler.slides:
      seen = seen & (slots < end)
    if self.sampler.context is not None:
      seen = seen & (slots >= end - self.sampler.context)
    return seen


def started(run: Run) -> Canvas:
  """Returns the canvas before the first call: what is given, and the prior."""
  objective, requests = run.sampler.objective, run.requests
  shape = requests.tokens.shape
  zeros, top = jnp.zeros(shape[:1], jnp.int32), run.sampler.policy.top
  prior = objective.prior(run.noise(zeros, run.network.batch.positions), shape)
  z = where(run.free, prior, objective.clean(run.process, requests.tokens))
  window = run.block(zeros)
  return Canvas(
    place=begun(run, requests.tokens),
    said=_nothing_said(run, window),
    z=z,
    hidden=run.network.nothing(run.head) if run.keeps else None,
    changed=zeros == 0 if run.keeps else None,
    step=zeros,
    calls=zeros,
    stopped=zeros > 0,
    stage=zeros,
    block=zeros,
    call=zeros,
    revealed_at=jnp.full(shape, -1, jnp.int32),
    log_prob=jnp.zeros(shape),
    top_ids=jnp.zeros((*shape, top), jnp.int32) if top else None,
    top_log_probs=jnp.zeros((*shape, top)) if top else None,
    cache=run.network.empty(),
    state=run.sampler.policy.init(run.process, take(z, window), window.active),
  )


def _nothing_said(run: Run, window: Window) -> Float[Array, "B W D"] | None:
  """Returns what a block is told at its first call, where it is told anything."""
  if not run.sampler.policy.conditions:
    return None
  out = run.head
  width = (out.hidden if out.unembed is None else out.unembed.T).shape[-1]
  return jnp.zeros((*window.slots.shape, width), jnp.float32)


def wanted(run: Run, canvas: Canvas) -> Bool[Array, "B"]:
  """Returns the rows in which there is something to sample, from a block on."""
  slots = run.network.batch.positions
  ahead = run.free & (slots >= run.first(canvas.block)[:, None])
  return jnp.any(ahead, axis=1) & ~canvas.stopped


def entered(
  run: Run, canvas: Canvas, window: Window, rows: Bool[Array, "B"]
) -> Canvas:
  """Returns the canvas with some rows at the first call of their block."""
  policy = run.sampler.policy
  z = take(canvas.z, window)
  state = policy.init(run.process, z, window.active)
  todo = jnp.any(window.active, axis=1)
  ready = todo & ~policy.done(run.process, z, state, window.active)
  # What is given is kept for what follows it, and what lies before it with it
  # where a call does that only at the next slot, or block; two passes have one
  # of their own for it (`left`).
  keep = run.sampler.cache == "block" and not run.sampler.objective.two_passes
  keep = _STORING if keep else IDLE
  kept = jnp.where(wanted(run, canvas), keep, IDLE)
  stage = jnp.where(ready, RUNNING, kept)
  if policy.conditions:
    said = where(rows, jnp.zeros_like(canvas.said), canvas.said)
    canvas = canvas.replace(said=said)
  return canvas.replace(
    state=where(rows, state, canvas.state),
    stage=jnp.where(rows, stage, canvas.stage),
    call=jnp.where(rows, 0, canvas.call),
    changed=canvas.changed | rows if run.keeps else None,
  )


def left(
  run: Run, canvas: Canvas, window: Window, rows: Bool[Array, "B"]
) -> Canvas:
  """Returns the canvas with some rows past their block."""
  canvas = canvas.replace(block=canvas.block + rows)
  tokens = take(run.sampler.objective.decode(run.process, canvas.z), window)
  if canvas.place is not None:
    place = passed(run, canvas.place, tokens, window, rows)
    canvas = canvas.replace(place=place)
  if run.ends is not None:
    ended = rows & jnp.any(run.ended(tokens) & window.active, axis=1)
    canvas = canvas.replace(stopped=canvas.stopped | ended)
  if run.sampler.objective.two_passes and run.sampler.blocks > 1:
    rows &= wanted(run, canvas)
    cache = run.network.finish(canvas.z, window, rows, canvas.cache)
    canvas = canvas.replace(cache=cache, calls=canvas.calls + rows)
  return canvas


def step(
  run: Run, canvas: Canvas, window: Window, rows: Bool[Array, "B"], fresh: bool
) -> tuple[Canvas, Frame | None]:
  """Calls the network once and lets the policy change the window.

  Args:
    run: what stays the same.
    canvas: what goes from step to step.
    window: the block.
    rows: those that take part, if they are not idle.
    fresh: whether the call makes an approximate cache anew.
  """
  policy, network = run.sampler.policy, run.network
  z = take(canvas.z, window)
  running = rows & (canvas.stage == RUNNING)
  t = jnp.where(running[:, None], policy.time(canvas.state), 0.0)
  calling = rows & (canvas.stage != IDLE)
  calling, hidden, cache = _look(run, canvas, window, t, calling, fresh)
  out, index = network.outputs(hidden, window, run.head)
  active, must = window.active & running[:, None], None
  if network.first_alone:  # by its entry's pass, from outside the block
    first, entry = window.slots == window.start[:, None], canvas.call == 0
    active &= first | ~entry[:, None]
    must = active & entry[:, None]
  guide = None if network.guidance is None else network.guidance.guide()
  told = run.rows(canvas.z, window)
  if canvas.place is not None:
    told = proposed(run, canvas, window, told, out, index=index, guide=guide)
  new_z, state, info = policy.step(
    run.process,
    run.noise(canvas.step, window.slots),
    out,
    z,
    canvas.state,
    active,
    window=index,
    guide=guide,
    rows=told,
    must=must,
  )
  new_z = where(active, new_z, z)
  state = where(running, state, canvas.state)
  done = policy.done(run.process, new_z, state, window.active)
  done &= canvas.call + 1 >= run.sampler.least_calls
  stage = jnp.where(done, _STORING if network.stores else IDLE, RUNNING)
  stage = jnp.where(running, stage, IDLE)
  after = canvas.replace(
    z=put(canvas.z, window, new_z),
    step=canvas.step + running,
    calls=canvas.calls + calling,
    stage=jnp.where(rows, stage, canvas.stage),
    call=canvas.call + rows,
    **noted(run, canvas, window._replace(active=active), new_z, info),
    cache=cache,
    state=state,
    hidden=hidden if run.keeps else None,
    said=where(running, info.get("said"), canvas.said),
    changed=_differs(new_z, z) if run.keeps else None,
    sound=_sound(canvas, calling, hidden),
  )
  if not run.trace:
    return after, None
  seen = observe(
    network.objective, run.process, out, z, new_z, t, window=index, guide=guide
  )
  seen |= {"confidence": info["confidence"]} if "confidence" in info else {}
  return after, _frame(run, after, window, running, seen)


def _frame(run: Run, canvas: Canvas, window: Window, running, seen) -> Frame:
  """Returns what a trace keeps of a step of some rows."""
  tokens = run.sampler.objective.decode(run.process, canvas.z)
  window = window._replace(active=window.active & running[:, None])
  return Frame(tokens=tokens, ran=running, **spread(seen, window, tokens.shape))


def _sound(canvas: Canvas, calling: Bool[Array, "B"], hidden: Array):
  """Returns the rows that are numbers still, where that is asked for."""
  if canvas.sound is None:
    return None
  branches = hidden.reshape(-1, calling.shape[0], *hidden.shape[1:])
  finite = jnp.all(~jnp.isnan(branches), axis=(0, 2, 3))
  return canvas.sound & (finite | ~calling)


def _look(run, canvas, window, t, calling, fresh):
  """Returns which rows need a network call, hidden states and the cache."""
  visible = run.visible(window)
  if run.sampler.policy.resizes:
    visible &= ~run.free | run.sampler.policy.live(canvas.state)
  if run.sampler.part is not None and not fresh:
    return calling, *parts.look(run, canvas, window, t, visible, calling)
  look = lambda: run.network.look(
    canvas.z, t, window, visible, canvas.cache, fresh, canvas.said
  )
  if not run.keeps:
    return calling, *look()
  calling &= canvas.changed
  same = lambda: (canvas.hidden, canvas.cache)
  return calling, *lax.cond(jnp.any(calling), look, same)


def noted(
  run: Run,
  canvas: Canvas,
  window: Window,
  new_z: PyTree,
  info: Mapping[str, Array],
) -> dict[str, Array]:
  """Returns when each slot took its token and how likely, after one more step.

  Vectors have no tokens before the last step, which all slots take: to decode
  them at every step would cost as much as calling the network. Nothing is drawn
  there.
  """
  taken = window.active
  if isinstance(new_z, jax.Array) and new_z.ndim == 2:
    taken &= new_z != take(canvas.z, window)
    if run.network.objective.mask_id is not None:
      taken &= new_z != run.network.objective.mask_id
  names = ("log_prob", "top_ids", "top_log_probs")
  new = {name: info[name] for name in names if name in info}
  new["revealed_at"] = jnp.broadcast_to(canvas.step[:, None], taken.shape)
  old = {name: getattr(canvas, name) for name in new}
  return put(old, window, where(taken, new, take(old, window)))


def _differs(new: PyTree, old: PyTree) -> Bool[Array, "B"]:
  """Returns the rows in which two latents differ."""
  pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
  rows = [jnp.any((a != b).reshape(a.shape[0], -1), axis=1) for a, b in pairs]
  return jnp.any(jnp.stack(rows), axis=0)

"""The loops of the sampling program: over blocks, and over network calls.

Loops end as soon as no row needs them; with a trace they are scans, whose
arrays have one shape. Rows that are done wait, frozen.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dllm_jax.core.types import KVCache, ModelOutputs, Noise, Process
from dllm_jax.sampling.forward import Network
from dllm_jax.sampling.requests import Requests
from dllm_jax.sampling.sampler import Sampler
from dllm_jax.sampling.traces.trace import Frame, observe
from dllm_jax.sampling.window import put, take, where, Window

NoiseAt = Callable[[Int[Array, "B"], Int[Array, "B W"]], Noise]
"""`(each row's own step, slots) -> noise` of a step."""

_IDLE, _STORING, _RUNNING = 0, 1, 2


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
    revealed_at: the step at which each slot took its token; -1 where it has
      taken none.
    cache: kept keys and values, or None.
    state: the policy's, inside a block.
  """

  z: PyTree
  step: Int[Array, "B"]
  calls: Int[Array, "B"]
  stopped: Bool[Array, "B"]
  stage: Int[Array, "B"]
  revealed_at: Int[Array, "B T"]
  cache: KVCache | None = None
  state: PyTree = None
  hidden: Float[Array, "R T D"] | None = None
  changed: Bool[Array, "B"] | None = None


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

  def first(self, k: Array) -> Int[Array, "B"]:
    """Returns where block k of each row begins."""
    width = self.sampler.block_length or self.sampler.length
    fixed = self.requests.fixed.astype(jnp.int32)
    prompt = jnp.sum(jnp.cumprod(fixed, axis=1), axis=1)
    if self.sampler.blocks_from == "start":
      prompt = prompt // width * width
    return prompt + k * width

  def window(self, k: Array) -> Window:
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
    if self.sampler.extend:
      seen = seen & (slots < end)
    if self.sampler.context is not None:
      seen = seen & (slots >= end - self.sampler.context)
    return seen


def prefilled(run: Run, canvas: Canvas) -> Canvas:
  """Returns the canvas with the prompts in its cache, if that is exact."""
  if run.sampler.cache != "block":
    return canvas
  known = run.first(jnp.int32(0)) - run.network.lead > 0
  cache = run.network.prefill(canvas.z, run.requests.valid, canvas.cache)
  return canvas.replace(cache=cache, calls=canvas.calls + known)


def blocks(run: Run, canvas: Canvas) -> tuple[Canvas, Frame | None]:
  """Samples all blocks, one after another."""
  count = run.sampler.blocks
  if run.trace:
    ks = jnp.arange(count)
    return lax.scan(lambda canvas, k: _block(run, canvas, k), canvas, ks)
  if count == 1:
    return _block(run, canvas, jnp.int32(0))

  def wanted(carry):
    k, canvas = carry
    slots = run.network.batch.positions
    ahead = run.free & (slots >= run.first(k)[:, None])
    return (k < count) & jnp.any(ahead & ~canvas.stopped[:, None])

  def body(carry):
    k, canvas = carry
    return k + 1, _block(run, canvas, k)[0]

  return lax.while_loop(wanted, body, (jnp.int32(0), canvas))[1], None


def _block(run: Run, canvas: Canvas, k: Array) -> tuple[Canvas, Frame | None]:
  """Samples block k of every row; returns the canvas and the traced steps."""
  policy, network = run.sampler.policy, run.network
  window = run.window(k)
  window = window._replace(active=window.active & ~canvas.stopped[:, None])
  z = take(canvas.z, window)
  state = policy.init(run.process, z, window.active)
  todo = jnp.any(window.active, axis=1)
  used = take(run.requests.valid, window) & (window.slots < run.sampler.length)
  keep = _STORING if network.stores else _IDLE
  kept = jnp.where(jnp.any(used, axis=1) & ~canvas.stopped, keep, _IDLE)
  ready = todo & ~policy.done(run.process, z, state, window.active)
  canvas = canvas.replace(
    state=state,
    stage=jnp.where(ready, _RUNNING, kept),
    changed=jnp.ones_like(ready) if run.keeps else None,
  )

  canvas, frames = _calls(run, canvas, window)
  canvas = canvas.replace(state=None, changed=None)
  if not run.sampler.end_ids:
    return canvas, frames
  tokens = take(run.sampler.objective.decode(run.process, canvas.z), window)
  ends = jnp.isin(tokens, jnp.asarray(run.sampler.end_ids))
  ended = jnp.any(ends & window.active, axis=1)
  return canvas.replace(stopped=canvas.stopped | ended), frames


def _calls(
  run: Run, canvas: Canvas, window: Window
) -> tuple[Canvas, Frame | None]:
  """Takes steps until no row of a block needs one; traced, as many as can be.

  An approximate cache is made anew by the first of every `refresh` steps. That is
  a loop in a loop, and not a condition: the cache would be copied for both sides.
  """
  policy, network = run.sampler.policy, run.network
  most = policy.steps + policy.extra + network.stores
  most = max(most, run.sampler.least_calls)
  every = min(network.refresh or most, most)
  carry = jnp.int32(0), canvas
  step = lambda fresh: lambda carry: _called(run, window, fresh, carry)
  if not network.approximate:
    (_, canvas), frames = _repeat(run, step(False), carry, most)
    return canvas, frames

  def cycle(carry):
    carry, first = step(True)(carry)
    if every == 1:
      return carry, jax.tree.map(lambda x: x[None], first)
    carry, rest = _repeat(run, step(False), carry, every - 1)
    joined = lambda a, b: jnp.concatenate([a[None], b])
    return carry, jax.tree.map(joined, first, rest)

  (_, canvas), frames = _repeat(run, cycle, carry, -(-most // every))
  flat = lambda x: x.reshape(-1, *x.shape[2:])[:most]
  return canvas, jax.tree.map(flat, frames)


def _repeat(run: Run, body: Callable, carry, most: int):
  """Returns the carry and the frames of steps, of which there are at most some."""
  if run.trace:
    return lax.scan(lambda carry, _: body(carry), carry, length=most)
  end = carry[0] + most
  more = lambda carry: (carry[0] < end) & _busy(carry)
  return lax.while_loop(more, lambda carry: body(carry)[0], carry), None


def _busy(carry: tuple[Int[Array, ""], Canvas]) -> Bool[Array, ""]:
  return jnp.any(carry[1].stage != _IDLE)


def _called(run: Run, window: Window, fresh: bool, carry):
  """Returns (calls, canvas) after one more, and its frame; traced, if needed."""

  def body(carry):
    call, canvas = carry
    canvas, frame = _step(run, canvas, window, call, fresh)
    return (call + 1, canvas), frame

  if not run.trace:
    return body(carry)
  skip = lambda carry: (carry, _blank(run, carry[1]))
  return lax.cond(_busy(carry), body, skip, carry)


def _step(
  run: Run, canvas: Canvas, window: Window, call: Int[Array, ""], fresh: bool
) -> tuple[Canvas, Frame | None]:
  """Calls the network once and lets the policy change the window.

  Args:
    run: what stays the same.
    canvas: what goes from step to step.
    window: the block.
    call: calls since it was entered.
    fresh: whether the call makes an approximate cache anew.
  """
  policy, network = run.sampler.policy, run.network
  z = take(canvas.z, window)
  running = canvas.stage == _RUNNING
  t = jnp.where(running[:, None], policy.time(canvas.state), 0.0)
  calling, hidden, cache = _look(run, canvas, window, t, fresh)
  out, index = network.outputs(hidden, window, run.head)
  active, must = window.active & running[:, None], None
  if network.approximate and network.objective.shift:
    # A block's first slot is predicted from outside it: by its entry's pass.
    first = window.slots == window.start[:, None]
    active = jnp.where(call == 0, active & first, active)
    must = active & (call == 0)
  guide = None if network.guidance is None else network.guidance.guide()
  new_z, state, info = policy.step(
    run.process,
    run.noise(canvas.step, window.slots),
    out,
    z,
    canvas.state,
    active,
    window=index,
    guide=guide,
    counts=_counts(run, canvas.z) if policy.counts else None,
    must=must,
  )
  new_z = where(active, new_z, z)
  state = where(running, state, canvas.state)
  done = policy.done(run.process, new_z, state, window.active)
  done &= call + 1 >= run.sampler.least_calls
  stage = jnp.where(done, _STORING if network.stores else _IDLE, _RUNNING)
  after = canvas.replace(
    z=put(canvas.z, window, new_z),
    step=canvas.step + running,
    calls=canvas.calls + calling,
    stage=jnp.where(running, stage, _IDLE),
    revealed_at=_revealed(run, canvas, window._replace(active=active), new_z),
    cache=cache,
    state=state,
    hidden=hidden if run.keeps else None,
    changed=_differs(new_z, z) if run.keeps else None,
  )
  if not run.trace:
    return after, None
  objective = network.objective
  seen = observe(
    objective, run.process, out, z, new_z, t, window=index, guide=guide
  )
  seen |= {name: info[name] for name in ("confidence",) if name in info}
  tokens = objective.decode(run.process, after.z)
  window = window._replace(active=window.active & running[:, None])
  return after, Frame(
    tokens=tokens, ran=running, **_spread(seen, window, tokens)
  )


def _look(
  run: Run, canvas: Canvas, window: Window, t: Array, fresh: bool
) -> tuple[Bool[Array, "B"], Float[Array, "R Q D"], KVCache | None]:
  """Returns which rows need a network call, hidden states and the cache."""
  visible = run.visible(window)
  look = lambda: run.network.look(
    canvas.z, t, window, visible, canvas.cache, fresh
  )
  calling = canvas.stage != _IDLE
  if not run.keeps:
    return calling, *look()
  calling &= canvas.changed
  same = lambda: (canvas.hidden, canvas.cache)
  return calling, *lax.cond(jnp.any(calling), look, same)


def _revealed(
  run: Run, canvas: Canvas, window: Window, new_z: PyTree
) -> Int[Array, "B T"]:
  """Returns at which step each slot took its token, after one more step.

  Vectors have no tokens before the last step, which all slots take: to decode
  them at every step would cost as much as calling the network.
  """
  old = take(canvas.revealed_at, window)
  taken = window.active
  if isinstance(new_z, jax.Array) and new_z.ndim == 2:
    taken &= new_z != take(canvas.z, window)
    if run.network.objective.mask_id is not None:
      taken &= new_z != run.network.objective.mask_id
  step = jnp.where(taken, canvas.step[:, None], old)
  return put(canvas.revealed_at, window, step)


def _differs(new: PyTree, old: PyTree) -> Bool[Array, "B"]:
  """Returns the rows in which two latents differ."""
  pairs = zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
  rows = [jnp.any((a != b).reshape(a.shape[0], -1), axis=1) for a, b in pairs]
  return jnp.any(jnp.stack(rows), axis=0)


def _counts(run: Run, z: PyTree) -> Int[Array, "B 1 V"]:
  """Returns how often each token stands in a row, masks left out."""
  objective = run.network.objective
  tokens = objective.decode(run.process, z)
  real = run.requests.valid & (tokens != (objective.mask_id or -1))
  zeros = jnp.zeros((objective.vocab_size,), jnp.int32)
  row = lambda tokens, real: zeros.at[tokens].add(real.astype(jnp.int32))
  return jax.vmap(row)(tokens, real)[:, None]


def finished(run: Run, canvas: Canvas) -> Int[Array, "B T"]:
  """Returns the tokens; after what ends a row, that token again."""
  tokens = run.network.objective.decode(run.process, canvas.z)
  if run.sampler.end_ids:
    ends = run.free & jnp.isin(tokens, jnp.asarray(run.sampler.end_ids))
    after = jnp.cumsum(ends, axis=1) - ends > 0
    first = jnp.argmax(ends, axis=1, keepdims=True)
    end = jnp.take_along_axis(tokens, first, axis=1)
    tokens = jnp.where(after & canvas.stopped[:, None], end, tokens)
  return jnp.where(run.free, tokens, run.requests.tokens)


def _blank(run: Run, canvas: Canvas) -> Frame:
  """Returns the frame of a step in which no row takes part."""
  tokens = run.network.objective.decode(run.process, canvas.z)
  no = jnp.zeros(tokens.shape, bool)
  nothing = jnp.zeros(tokens.shape, jnp.float32)
  return Frame(
    tokens=tokens,
    confidence=nothing,
    entropy=nothing,
    committed=no,
    remasked=no,
    ran=jnp.zeros(tokens.shape[:1], bool),
  )


def _spread(
  seen: Mapping[str, Array], window: Window, canvas: Int[Array, "B T"]
) -> dict[str, Array]:
  """Returns what a window showed on the whole canvas, 0 elsewhere."""
  blank = {
    name: jnp.zeros(canvas.shape, value.dtype) for name, value in seen.items()
  }
  zeros = jax.tree.map(jnp.zeros_like, dict(seen))
  return put(blank, window, where(window.active, dict(seen), zeros))

"""The one sampling program: the whole unmasking inside one XLA program.

    prior -> clamp what is fixed -> loop over blocks(
        policy.init -> loop over steps( network -> policy.step ) ) -> decode

Block k of a row covers the `block_length` slots at its own pointer, counted
from the end of its prompt or from slot 0; a block as long as the canvas is
plain diffusion. Loops end as soon as no row needs them; with a trace they are
scans, whose arrays have one shape. Pure functions only: the program is compiled
in `launch`, and a policy decides what is revealed. A row's tokens depend on its
own slots, number and noise, never on its neighbours: rows that are done wait,
frozen.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Literal, NamedTuple

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, PyTree

from dllm_jax.core.noise import Keyed
from dllm_jax.core.types import (
  Batch,
  Denoiser,
  KVCache,
  ModelOutputs,
  Noise,
  Objective,
  Policy,
  Process,
)
from dllm_jax.sampling.forward import CacheKind, check_cache, Network
from dllm_jax.sampling.guidance import Guidance
from dllm_jax.sampling.requests import Requests
from dllm_jax.sampling.trace import Frame, observe, Trace
from dllm_jax.sampling.window import put, take, where, Window

NoiseAt = Callable[[Int[Array, "B"], Int[Array, "B W"]], Noise]
"""`(each row's own step, slots) -> noise` of a step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
  """How a canvas is sampled; hashable, static under jit.

  Attributes:
    policy: what each network call reveals; knows the objective and the steps.
    length: slots of the canvas (T).
    block_length: slots sampled together, left to right; None for the whole
      canvas at once.
    blocks_from: where blocks are counted from: each row's "prompt" (its end;
      LLaDA, Dream) or the "start" of the canvas (BD3-LM, SDAR, LLaDA2).
    cache: what is kept between network calls (`forward`).
    refresh: calls between passes over the canvas inside a block, for
      approximate caches; 0 for one at each block's entry.
    guidance: of two branches, or None.
    eos_id: a row stops after the block in which it draws this token, and its
      free slots after it hold it too; None for no such stop.
    extend: whether slots after the block are hidden: the text grows block by
      block, and the canvas is only room.
    context: slots that are seen at once, up to the block's end; None for all.
    least_calls: network calls that a block takes at least; the cached originals
      of Fast-dLLM take 2.
  """

  policy: Policy
  length: int
  block_length: int | None = None
  blocks_from: Literal["prompt", "start"] = "prompt"
  cache: CacheKind = "none"
  refresh: int = 0
  guidance: Guidance | None = None
  eos_id: int | None = None
  extend: bool = False
  context: int | None = None
  least_calls: int = 1

  def __post_init__(self):
    if self.length < 1:
      raise ValueError(f"the canvas needs at least 1 slot, not {self.length}")
    width = self.length if self.block_length is None else self.block_length
    if not 1 <= width <= self.length:
      raise ValueError(
        f"block_length must lie in [1, {self.length}], the canvas, or be None "
        f"for all of it, not {self.block_length}"
      )
    if self.blocks_from not in ("prompt", "start"):
      raise ValueError(
        f"blocks_from must be prompt or start, not {self.blocks_from!r}"
      )
    if self.refresh < 0 or self.least_calls < 1:
      raise ValueError(
        "refresh must be 0 (at a block's entry) or more and least_calls at "
        f"least 1, not {self.refresh} and {self.least_calls}"
      )
    if self.context is not None and not width <= self.context <= self.length:
      raise ValueError(
        f"context must lie in [{width}, {self.length}], from a block to the "
        f"canvas, or be None, not {self.context}"
      )
    if self.guidance is not None:
      self.guidance.check(self.objective)
    check_cache(
      self.cache,
      self.objective,
      block_length=self.block_length,
      blocks_from=self.blocks_from,
      forces=self.policy.forces,
    )

  @property
  def objective(self) -> Objective:
    """The diffusion that the network was trained for."""
    return self.policy.objective

  @property
  def steps(self) -> int:
    """Network calls for each block, at most."""
    return self.policy.steps

  @property
  def blocks(self) -> int:
    """The number of blocks of a row without a prompt, the longest case."""
    return -(-self.length // (self.block_length or self.length))


@struct.dataclass
class Generation:
  """What a sampler returns.

  Attributes:
    tokens: the finished canvases; unused slots hold what the request had there.
    function_evaluations: network calls that each row took part in; both
      branches of guidance are one.
    trace: every step of it, if it was asked for.
  """

  tokens: Int[Array, "B T"]
  function_evaluations: Int[Array, "B"]
  trace: Trace | None = None


_IDLE, _STORING, _RUNNING = 0, 1, 2


@struct.dataclass
class _Canvas:
  """What goes from step to step.

  Attributes:
    z: the latent, leaves `[B, T, ...]`.
    step: each row's own count of the policy's steps.
    calls: each row's count of network calls.
    stopped: rows that have drawn their end of text.
    stage: what each row does in this block: idle, storing or running.
    cache: kept keys and values, or None.
    state: the policy's, inside a block.
  """

  z: PyTree
  step: Int[Array, "B"]
  calls: Int[Array, "B"]
  stopped: Bool[Array, "B"]
  stage: Int[Array, "B"]
  cache: KVCache | None = None
  state: PyTree = None


def generate(
  sampler: Sampler,
  denoiser: Denoiser,
  params: PyTree,
  process: Process,
  key: Key[Array, ""],
  requests: Requests,
  *,
  trace: bool = False,
  noise: NoiseAt | None = None,
) -> Generation:
  """Returns samples of a batch of requests.

  Args:
    sampler: how to sample (static).
    denoiser: the network.
    params: its parameters.
    process: the arrays of the objective.
    key: the seed. Noise is a function of (key, request, the row's own step,
      slot) and the kind of draw, and of nothing else.
    requests: what is fixed, and what is wanted.
    trace: whether every step is kept.
    noise: where randomness comes from instead, to replay that of another
      implementation.

  Raises:
    ValueError: the requests are on canvases of another length, or there is none,
      or the network cannot fill the cache.
  """
  run = _prepare(sampler, denoiser, params, process, key, requests, noise, trace)
  objective, requests = sampler.objective, run.requests
  shape = requests.tokens.shape
  zeros = jnp.zeros(shape[:1], jnp.int32)
  prior = objective.prior(run.noise(zeros, run.network.batch.positions), shape)
  start = where(run.free, prior, objective.clean(process, requests.tokens))
  canvas = _Canvas(
    z=start,
    step=zeros,
    calls=zeros,
    stopped=zeros > 0,
    stage=zeros,
    cache=run.network.empty(),
  )
  canvas, frames = _blocks(run, _prefilled(run, canvas))
  record = None
  if trace:
    record = Trace(
      initial=objective.decode(process, start),
      fixed=requests.fixed,
      valid=requests.valid,
      frames=jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), frames),
      mask_id=objective.mask_id,
    )
  return Generation(
    tokens=_finished(run, canvas),
    function_evaluations=canvas.calls,
    trace=record,
  )


class _Run(NamedTuple):
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


def _prepare(
  sampler: Sampler,
  denoiser: Denoiser,
  params: PyTree,
  process: Process,
  key: Key[Array, ""],
  requests: Requests,
  noise: NoiseAt | None,
  trace: bool,
) -> _Run:
  """Returns a run after a look at the shapes."""
  shape = requests.tokens.shape
  if shape[0] < 1:
    raise ValueError("nothing to sample: the batch of requests is empty")
  if shape[1] != sampler.length:
    raise ValueError(
      f"the requests have {shape[1]} slots a row but the sampler has a canvas "
      f"of {sampler.length}: build both with the same length"
    )
  if sampler.cache != "none" and denoiser.cache is None:
    raise ValueError(
      f"cache {sampler.cache!r} with a network that keeps no keys and values: "
      "use cache 'none'"
    )
  requests = jax.tree.map(jnp.asarray, requests)
  batch = Batch(
    tokens=requests.tokens,
    loss_mask=requests.valid & ~requests.fixed,
    segment_ids=requests.valid.astype(jnp.int32),
    positions=jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape),
    cond=requests.cond,
  )
  guidance = sampler.guidance
  network = Network(
    denoiser=denoiser,
    params=params,
    process=process,
    objective=sampler.objective,
    batch=batch,
    cache=sampler.cache,
    refresh=sampler.refresh,
    guidance=guidance if guidance is not None and guidance.scale else None,
  )
  if noise is None:
    noise = lambda step, slots: Keyed.at(
      key,
      request=requests.request,
      step=step,
      position=jnp.minimum(slots, sampler.length - 1),
    )
  return _Run(sampler, network, network.head(), requests, noise, trace)


def _prefilled(run: _Run, canvas: _Canvas) -> _Canvas:
  """Returns the canvas with the prompts in its cache, if that is exact."""
  if run.sampler.cache != "block":
    return canvas
  known = run.first(jnp.int32(0)) - run.network.lead > 0
  cache = run.network.prefill(canvas.z, run.requests.valid, canvas.cache)
  return canvas.replace(cache=cache, calls=canvas.calls + known)


def _blocks(run: _Run, canvas: _Canvas) -> tuple[_Canvas, Frame | None]:
  """Samples all blocks, one after another."""
  blocks = run.sampler.blocks
  if run.trace:
    ks = jnp.arange(blocks)
    return lax.scan(lambda canvas, k: _block(run, canvas, k), canvas, ks)
  if blocks == 1:
    return _block(run, canvas, jnp.int32(0))

  def wanted(carry):
    k, canvas = carry
    slots = run.network.batch.positions
    ahead = run.free & (slots >= run.first(k)[:, None])
    return (k < blocks) & jnp.any(ahead & ~canvas.stopped[:, None])

  def body(carry):
    k, canvas = carry
    return k + 1, _block(run, canvas, k)[0]

  return lax.while_loop(wanted, body, (jnp.int32(0), canvas))[1], None


def _block(
  run: _Run, canvas: _Canvas, k: Array
) -> tuple[_Canvas, Frame | None]:
  """Samples block k of every row; returns the canvas and the traced steps."""
  policy, network = run.sampler.policy, run.network
  window = run.window(k)
  window = window._replace(active=window.active & ~canvas.stopped[:, None])
  z = take(canvas.z, window)
  state = policy.init(run.process, z, window.active)
  todo = jnp.any(window.active, axis=1)
  used = take(run.requests.valid, window) & (
    window.slots < run.sampler.length
  )
  keep = _STORING if network.stores else _IDLE
  kept = jnp.where(jnp.any(used, axis=1) & ~canvas.stopped, keep, _IDLE)
  ready = todo & ~policy.done(run.process, z, state, window.active)
  canvas = canvas.replace(state=state, stage=jnp.where(ready, _RUNNING, kept))

  def busy(carry):
    return jnp.any(carry[1].stage != _IDLE)

  def body(carry):
    call, canvas = carry
    canvas, frame = _step(run, canvas, window, call)
    return (call + 1, canvas), frame

  carry = jnp.int32(0), canvas
  frames = None
  if run.trace:
    skip = lambda carry: (carry, _blank(run, carry[1]))
    most = policy.steps + policy.extra + network.stores
    carry, frames = lax.scan(
      lambda carry, _: lax.cond(busy(carry), body, skip, carry),
      carry,
      length=max(most, run.sampler.least_calls),
    )
  else:
    carry = lax.while_loop(busy, lambda carry: body(carry)[0], carry)
  canvas = carry[1].replace(state=None)
  if run.sampler.eos_id is None:
    return canvas, frames
  tokens = take(run.sampler.objective.decode(run.process, canvas.z), window)
  ended = jnp.any((tokens == run.sampler.eos_id) & window.active, axis=1)
  return canvas.replace(stopped=canvas.stopped | ended), frames


def _step(
  run: _Run, canvas: _Canvas, window: Window, call: Int[Array, ""]
) -> tuple[_Canvas, Frame | None]:
  """Calls the network once and lets the policy change the window."""
  policy, network = run.sampler.policy, run.network
  z = take(canvas.z, window)
  running = canvas.stage == _RUNNING
  t = jnp.where(running[:, None], policy.time(canvas.state), 0.0)
  out, index, cache = network.look(
    canvas.z, t, window, run.visible(window), canvas.cache, call, run.head
  )
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
    calls=canvas.calls + (canvas.stage != _IDLE),
    stage=jnp.where(running, stage, _IDLE),
    cache=cache,
    state=state,
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


def _counts(run: _Run, z: PyTree) -> Int[Array, "B 1 V"]:
  """Returns how often each token stands in a row, masks left out."""
  objective = run.network.objective
  tokens = objective.decode(run.process, z)
  real = run.requests.valid & (tokens != (objective.mask_id or -1))
  zeros = jnp.zeros((objective.vocab_size,), jnp.int32)
  row = lambda tokens, real: zeros.at[tokens].add(real.astype(jnp.int32))
  return jax.vmap(row)(tokens, real)[:, None]


def _finished(run: _Run, canvas: _Canvas) -> Int[Array, "B T"]:
  """Returns the tokens; after a row's end of text, that token again."""
  tokens = run.network.objective.decode(run.process, canvas.z)
  eos = run.sampler.eos_id
  if eos is not None:
    ends = run.free & (tokens == eos)
    after = jnp.cumsum(ends, axis=1) - ends > 0
    tokens = jnp.where(after & canvas.stopped[:, None], eos, tokens)
  return jnp.where(run.free, tokens, run.requests.tokens)


def _blank(run: _Run, canvas: _Canvas) -> Frame:
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

"""The one sampling program: the whole unmasking inside one XLA program.

    prior -> clamp what is fixed -> scan over blocks(
        policy.init -> scan over steps( network -> policy.step ) ) -> decode

Block k of a row covers the `block_length` slots at its own pointer, which
starts at the end of its prompt; a block as long as the canvas is plain
diffusion. Pure functions only: the program is compiled in `launch`, and a
policy decides what is revealed. A row's tokens depend on its own slots, number and
noise, never on its neighbours.
"""

from collections.abc import Mapping
import dataclasses
from typing import NamedTuple

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from dllm_jax.core.noise import Keyed
from dllm_jax.core.types import (
  Batch,
  Denoiser,
  ModelOutputs,
  Objective,
  Policy,
  Process,
)
from dllm_jax.core.vocabulary import vocab_width
from dllm_jax.sampling.requests import Requests
from dllm_jax.sampling.trace import Frame, observe, Trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
  """How a canvas is sampled; hashable, static under jit.

  Attributes:
    policy: what each network call reveals; knows the objective and the steps.
    length: slots of the canvas (T).
    block_length: slots sampled together, left to right from each row's prompt;
      None for the whole canvas at once.
  """

  policy: Policy
  length: int
  block_length: int | None = None

  def __post_init__(self):
    if self.length < 1:
      raise ValueError(f"the canvas needs at least 1 slot, not {self.length}")
    if self.block_length is not None and not (
      1 <= self.block_length <= self.length
    ):
      raise ValueError(
        f"block_length must lie in [1, {self.length}], the canvas, or be None "
        f"for all of it, not {self.block_length}"
      )

  @property
  def objective(self) -> Objective:
    """The diffusion that the network was trained for."""
    return self.policy.objective

  @property
  def steps(self) -> int:
    """Network calls for each block."""
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
    function_evaluations: network calls that each row took part in.
    trace: every step of it, if it was asked for.
  """

  tokens: Int[Array, "B T"]
  function_evaluations: Int[Array, "B"]
  trace: Trace | None = None


@struct.dataclass
class _Canvas:
  """What goes from step to step.

  Attributes:
    z: the latent, leaves `[B, T, ...]`.
    step: each row's own count of network calls.
    state: the policy's, inside a block.
  """

  z: PyTree
  step: Int[Array, "B"]
  state: PyTree = None


class _Window(NamedTuple):
  """The slots of a block.

  Attributes:
    slots: canvas slots, `[B, W]`; beyond the canvas at a row's end.
    active: which of them may change.
    hidden: the slots whose outputs predict them; None for all, in order.
    whole: whether it is the canvas itself, in order.
  """

  slots: Int[Array, "B W"]
  active: Bool[Array, "B W"]
  hidden: Int[Array, "B W"] | None
  whole: bool


def generate(
  sampler: Sampler,
  denoiser: Denoiser,
  params: PyTree,
  process: Process,
  key: Key[Array, ""],
  requests: Requests,
  *,
  trace: bool = False,
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

  Raises:
    ValueError: the requests are on canvases of another length.
  """
  run = _prepare(sampler, denoiser, params, process, key, requests, trace)
  objective, requests = sampler.objective, run.requests
  shape = requests.tokens.shape
  zeros = jnp.zeros(shape[:1], jnp.int32)
  noise = run.noise(zeros, run.batch.positions)
  start = _where(
    run.free,
    objective.prior(noise, shape),
    objective.clean(process, requests.tokens),
  )
  # A trace keeps all blocks: its arrays have one shape, whatever the prompts.
  block = _block if trace or sampler.blocks == 1 else _block_if_any
  canvas, frames = lax.scan(
    lambda canvas, k: block(run, canvas, k),
    _Canvas(z=start, step=zeros),
    jnp.arange(sampler.blocks),
  )
  tokens = objective.decode(process, canvas.z)
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
    tokens=jnp.where(run.free, tokens, requests.tokens),
    function_evaluations=canvas.step,
    trace=record,
  )


class _Run(NamedTuple):
  """What stays the same during a generation; arguments as in `generate`.

  Attributes:
    batch: the requests as the objective's `inputs` wants them.
  """

  sampler: Sampler
  denoiser: Denoiser
  params: PyTree
  process: Process
  key: Key[Array, ""]
  requests: Requests
  batch: Batch
  trace: bool

  @property
  def free(self) -> Bool[Array, "B T"]:
    """Returns True at slots to be sampled."""
    return self.batch.loss_mask

  def noise(self, step: Int[Array, "B"], slots: Int[Array, "B W"]) -> Keyed:
    """Returns the noise of some slots at each row's own step."""
    return Keyed.at(
      self.key,
      request=self.requests.request,
      step=step,
      position=jnp.minimum(slots, self.sampler.length - 1),
    )

  def network(self, z: PyTree, t: Float[Array, "B 1"]) -> ModelOutputs:
    """Returns the network's outputs, without columns that only pad."""
    objective = self.sampler.objective
    inputs = objective.inputs(self.process, z, t, self.batch)
    out, _ = self.denoiser.apply(self.params, inputs, None)
    if out.vocab_size is None and vocab_width(out) > objective.vocab_size:
      return out.replace(vocab_size=objective.vocab_size)
    return out


def _prepare(
  sampler: Sampler,
  denoiser: Denoiser,
  params: PyTree,
  process: Process,
  key: Key[Array, ""],
  requests: Requests,
  trace: bool,
) -> _Run:
  """Returns a run after a look at the shapes."""
  shape = requests.tokens.shape
  if shape[1] != sampler.length:
    raise ValueError(
      f"the requests have {shape[1]} slots a row but the sampler has a canvas "
      f"of {sampler.length}: build both with the same length"
    )
  requests = jax.tree.map(jnp.asarray, requests)
  batch = Batch(
    tokens=requests.tokens,
    loss_mask=requests.valid & ~requests.fixed,
    segment_ids=requests.valid.astype(jnp.int32),
    positions=jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape),
    cond=requests.cond,
  )
  return _Run(sampler, denoiser, params, process, key, requests, batch, trace)


def _block(
  run: _Run, canvas: _Canvas, k: Array
) -> tuple[_Canvas, Frame | None]:
  """Samples block k of every row; returns the canvas and the traced steps."""
  window = _window(run, k)
  z = _take(canvas.z, window)
  state = run.sampler.policy.init(run.process, z, window.active)
  canvas, frames = lax.scan(
    lambda canvas, _: _step(run, canvas, window),
    canvas.replace(state=state),
    length=run.sampler.steps,
  )
  return canvas.replace(state=None), frames


def _block_if_any(run: _Run, canvas: _Canvas, k: Array) -> tuple[_Canvas, None]:
  """Skips a block that no row has: their number depends on the prompts."""
  after = lax.cond(
    jnp.any(_window(run, k).active),
    lambda: _block(run, canvas, k)[0],
    lambda: canvas,
  )
  return after, None


def _step(
  run: _Run, canvas: _Canvas, window: _Window
) -> tuple[_Canvas, Frame | None]:
  """Calls the network once and lets the policy change the window."""
  policy, z = run.sampler.policy, _take(canvas.z, window)
  t = policy.time(canvas.state)
  out = run.network(canvas.z, t)
  new_z, state, info = policy.step(
    run.process,
    run.noise(canvas.step, window.slots),
    out,
    z,
    canvas.state,
    window.active,
    window=window.hidden,
  )
  new_z = _where(window.active, new_z, z)
  row = jnp.any(window.active, axis=1)
  after = _Canvas(
    z=_put(canvas.z, window, new_z),
    step=canvas.step + row,
    state=_where(row, state, canvas.state),
  )
  if not run.trace:
    return after, None
  objective = run.sampler.objective
  seen = observe(objective, run.process, out, z, new_z, t, window=window.hidden)
  seen |= {name: info[name] for name in ("confidence",) if name in info}
  tokens = objective.decode(run.process, after.z)
  return after, Frame(tokens=tokens, ran=row, **_spread(seen, window, tokens))


def _spread(
  seen: Mapping[str, Array], window: _Window, canvas: Int[Array, "B T"]
) -> dict[str, Array]:
  """Returns what a window showed on the whole canvas, 0 elsewhere."""
  blank = {
    name: jnp.zeros(canvas.shape, value.dtype) for name, value in seen.items()
  }
  zeros = jax.tree.map(jnp.zeros_like, dict(seen))
  return _put(blank, window, _where(window.active, dict(seen), zeros))


def _window(run: _Run, k: Array) -> _Window:
  """Returns block k of each row, at the row's own pointer."""
  length, width = run.sampler.length, run.sampler.block_length
  shift = run.sampler.objective.shift
  if width is None:
    slots = jnp.broadcast_to(jnp.arange(length), run.free.shape)
    return _Window(slots, run.free, slots - shift if shift else None, True)
  prompt = jnp.cumprod(run.requests.fixed.astype(jnp.int32), axis=1)
  first = jnp.sum(prompt, axis=1) + k * width
  slots = first[:, None] + jnp.arange(width)
  inside = jnp.minimum(slots, length - 1)
  active = jnp.take_along_axis(run.free, inside, axis=1) & (slots < length)
  return _Window(slots, active, jnp.maximum(inside - shift, 0), False)


def _where(mask: Bool[Array, "*n"], new: PyTree, old: PyTree) -> PyTree:
  """Returns new where the mask of leading axes is True, else old."""

  def leaf(a, b):
    return jnp.where(
      mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim)), a, b
    )

  return jax.tree.map(leaf, new, old)


def _take(z: PyTree, window: _Window) -> PyTree:
  """Returns the slots of a window; past the end, its last slot."""
  if window.whole:
    return z

  def leaf(x):
    slots = jnp.minimum(window.slots, x.shape[1] - 1)
    return jax.vmap(lambda row, at: row[at])(x, slots)

  return jax.tree.map(leaf, z)


def _put(z: PyTree, window: _Window, new: PyTree) -> PyTree:
  """Returns z with a window replaced; none past the end."""
  if window.whole:
    return new

  def leaf(x, y):
    set_row = lambda row, at, values: row.at[at].set(values, mode="drop")
    return jax.vmap(set_row)(x, window.slots, y)

  return jax.tree.map(leaf, z, new)

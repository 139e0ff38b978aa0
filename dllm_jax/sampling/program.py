"""The one sampling program: the whole unmasking inside one XLA program.

    prior -> clamp what is fixed -> scan over blocks(
        policy.init -> scan over steps( network -> policy.step ) ) -> decode

Block k of a row covers the `block_length` slots at its own pointer, which starts
at the end of its prompt; a block as long as the canvas is plain diffusion.
Pure functions only: the program is compiled in `launch`, and a policy decides
what is revealed. A row's tokens depend on its own slots, number and noise, never
on its neighbours.
"""

from collections.abc import Mapping
import dataclasses
from typing import NamedTuple

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, PyTree

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
    objective: the diffusion that the network was trained for.
    policy: what each network call reveals.
    steps: network calls for each block, the policy's own number.
    length: slots of the canvas (T).
    block_length: slots sampled together, left to right from each row's prompt;
      None for the whole canvas at once.
  """

  objective: Objective
  policy: Policy
  steps: int
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
    if self.steps != self.policy.steps or (
        self.objective != self.policy.objective
    ):
      raise ValueError(
          f"the sampler ({self.steps} steps) and its policy "
          f"({self.policy.steps} steps) must have the same objective and steps"
      )

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
    key: the seed. Noise is a function of (key, request, the row's own step, slot)
      and the kind of draw, and of nothing else.
    requests: what is fixed, and what is wanted.
    trace: whether every step is kept.

  Raises:
    ValueError: the requests are on canvases of another length.
  """
  objective = sampler.objective
  shape = requests.tokens.shape
  if shape[1] != sampler.length:
    raise ValueError(
        f"the requests have {shape[1]} slots a row but the sampler has a canvas "
        f"of {sampler.length}: build both with the same length"
    )
  positions = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
  free = requests.valid & ~requests.fixed
  zeros = jnp.zeros(shape[:1], jnp.int32)
  noise = Keyed.at(key, request=requests.request, step=zeros, position=positions)
  start = _where(
      free,
      objective.prior(noise, shape),
      objective.clean(process, jnp.asarray(requests.tokens)),
  )
  batch = Batch(
      tokens=jnp.asarray(requests.tokens),
      loss_mask=free,
      segment_ids=jnp.asarray(requests.valid).astype(jnp.int32),
      positions=positions,
      cond=requests.cond,
  )

  def step(canvas, window):
    z = _take(canvas.z, window)
    t = sampler.policy.time(canvas.state)
    inputs = objective.inputs(process, canvas.z, t, batch)
    out = _real_tokens(denoiser.apply(params, inputs, None)[0], objective)
    noise = Keyed.at(
        key,
        request=requests.request,
        step=canvas.step,
        position=jnp.minimum(window.slots, shape[1] - 1),
    )
    new_z, new_state, info = sampler.policy.step(
        process, noise, out, z, canvas.state, window.active, window=window.hidden
    )
    new_z = _where(window.active, new_z, z)
    row = jnp.any(window.active, axis=1)
    after = _Canvas(
        z=_put(canvas.z, window, new_z),
        step=canvas.step + row,
        state=_where(row, new_state, canvas.state),
    )
    if not trace:
      return after, None
    return after, _frame(objective, process, out, window, z, new_z, t, after, info)

  def block(canvas, k):
    window = _window(sampler, requests, free, k)
    state = sampler.policy.init(process, _take(canvas.z, window), window.active)
    canvas, frames = lax.scan(
        lambda canvas, _: step(canvas, window),
        canvas.replace(state=state),
        length=sampler.steps,
    )
    return canvas.replace(state=None), frames

  def block_if_any(canvas, k):
    """Skips blocks that no row has, whose number depends on the prompts."""
    active = _window(sampler, requests, free, k).active
    after = lax.cond(
        jnp.any(active), lambda: block(canvas, k)[0], lambda: canvas
    )
    return after, None

  canvas, frames = lax.scan(
      # A trace keeps all blocks: its arrays have one shape, whatever the prompts.
      block if trace or sampler.blocks == 1 else block_if_any,
      _Canvas(z=start, step=zeros),
      jnp.arange(sampler.blocks),
  )
  tokens = jnp.where(free, objective.decode(process, canvas.z), requests.tokens)
  record = None
  if trace:
    record = Trace(
        initial=objective.decode(process, start),
        fixed=jnp.asarray(requests.fixed),
        valid=jnp.asarray(requests.valid),
        frames=jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), frames),
        mask_id=objective.mask_id,
    )
  return Generation(
      tokens=tokens, function_evaluations=canvas.step, trace=record
  )


def _real_tokens(out: ModelOutputs, objective: Objective) -> ModelOutputs:
  """Returns outputs without the columns that only pad the vocabulary."""
  if out.vocab_size is None and vocab_width(out) > objective.vocab_size:
    return out.replace(vocab_size=objective.vocab_size)
  return out


def _window(
    sampler: Sampler, requests: Requests, free: Bool[Array, "B T"], k: Array
) -> _Window:
  """Returns block k of each row, at the row's own pointer."""
  batch, length = free.shape
  shift = sampler.objective.shift
  if sampler.block_length is None:
    slots = jnp.broadcast_to(jnp.arange(length), free.shape)
    return _Window(slots, free, slots - shift if shift else None, True)
  prompt = jnp.cumprod(requests.fixed.astype(jnp.int32), axis=1)
  first = jnp.sum(prompt, axis=1) + k * sampler.block_length
  slots = first[:, None] + jnp.arange(sampler.block_length)
  inside = jnp.minimum(slots, length - 1)
  active = jnp.take_along_axis(free, inside, axis=1) & (slots < length)
  return _Window(slots, active, jnp.maximum(inside - shift, 0), False)


def _where(mask: Bool[Array, "*n"], new: PyTree, old: PyTree) -> PyTree:
  """Returns new where the mask of leading axes is True, else old."""

  def leaf(a, b):
    return jnp.where(mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim)), a, b)

  return jax.tree.map(leaf, new, old)


def _take(z: PyTree, window: _Window) -> PyTree:
  """Returns the slots of a window; those beyond the canvas repeat its last."""

  if window.whole:
    return z

  def leaf(x):
    slots = jnp.minimum(window.slots, x.shape[1] - 1)
    return jax.vmap(lambda row, at: row[at])(x, slots)

  return jax.tree.map(leaf, z)


def _put(z: PyTree, window: _Window, new: PyTree) -> PyTree:
  """Returns z with a window replaced; what lies beyond the canvas is dropped."""

  if window.whole:
    return new

  def leaf(x, y):
    set_row = lambda row, at, values: row.at[at].set(values, mode="drop")
    return jax.vmap(set_row)(x, window.slots, y)

  return jax.tree.map(leaf, z, new)


def _frame(
    objective: Objective,
    process: Process,
    out: ModelOutputs,
    window: _Window,
    z: PyTree,
    new_z: PyTree,
    t: Array,
    after: _Canvas,
    info: Mapping[str, Array],
) -> Frame:
  """Returns what a step did, spread over the canvas."""
  seen = observe(
      objective, process, out, z, new_z, t, window=window.hidden
  ) | {name: info[name] for name in ("confidence",) if name in info}
  tokens = objective.decode(process, after.z)
  blank = {
      name: jnp.zeros(tokens.shape, value.dtype) for name, value in seen.items()
  }
  seen = {
      name: jnp.where(window.active, value, jnp.zeros_like(value))
      for name, value in seen.items()
  }
  spread = _put(blank, window, seen)
  return Frame(
      tokens=tokens, ran=jnp.any(window.active, axis=1), **spread
  )

"""The sampling program cut at network calls: rows that are at different places.

    admit    a request into one row: its canvas; its prompt into an exact cache,
             less what another row's cache holds of it
    advance  network calls, until some row has finished a block or a number of
             calls is used up:
               rows past a block enter the next
               rows whose approximate cache is due are passed over the canvas
               all other rows take a step on their blocks

Pure functions of a state whose shapes never change; blocks, steps and policies are
those of `sampling.loop`, where the rows of a batch wait for each other at each
block. No row reads another, so that a row has the tokens that it has there.
"""

from typing import NamedTuple

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, PyTree

from dllm_jax.core.axes import axis_size, BATCH_AXES, constrain, TENSOR
from dllm_jax.core.types import Denoiser, KVCache, Process
from dllm_jax.sampling.loop import (
  Canvas,
  entered,
  IDLE,
  left,
  Run,
  started,
  step,
  wanted,
)
from dllm_jax.sampling.program import prepared
from dllm_jax.sampling.requests import Requests
from dllm_jax.sampling.sampler import Sampler


@struct.dataclass
class Slots:
  """Rows that requests come to and leave.

  Attributes:
    requests: what each was asked for; a free one has no slot in use.
    canvas: how far it is.
  """

  requests: Requests
  canvas: Canvas


@struct.dataclass
class View:
  """What the host is told of all rows.

  Attributes:
    tokens: the canvases; masks where nothing is drawn yet.
    final: slots that stay as they are.
    over: rows that have nothing more to sample.
    sound: rows whose network calls all gave numbers.
    calls: network calls of each row.
    kept: slots from the first whose keys and values are exact, and stay.
    rounds: network calls of this advance.
  """

  tokens: Int[Array, "B T"]
  final: Bool[Array, "B T"]
  over: Bool[Array, "B"]
  sound: Bool[Array, "B"]
  calls: Int[Array, "B"]
  kept: Int[Array, "B"]
  rounds: Int[Array, ""]


class Model(NamedTuple):
  """What stays the same while rows come and go.

  Attributes:
    sampler: how they are sampled (static).
    denoiser: the network (static).
    params: its parameters, held (`Denoiser.hold`).
    process: the arrays of the objective.
    key: the seed.
  """

  sampler: Sampler
  denoiser: Denoiser
  params: PyTree
  process: Process
  key: Key[Array, ""]

  def run(self, requests: Requests) -> Run:
    """Returns what the functions of `sampling.loop` want."""
    return prepared(*self, requests)


def empty(model: Model, requests: Requests) -> Slots:
  """Returns rows that are all free; requests are as many blank ones."""
  canvas = started(model.run(requests))
  sound = jnp.ones_like(canvas.stopped)
  return _placed(Slots(requests, canvas.replace(sound=sound)))


def admit(
  model: Model,
  slots: Slots,
  request: Requests,
  row: Int[Array, ""],
  source: Int[Array, ""],
  start: Int[Array, ""],
  *,
  width: int,
) -> Slots:
  """Returns the rows with one request more, or with one row free.

  Args:
    model: what stays the same.
    slots: the rows.
    request: one row; without a slot in use it frees the row.
    row: where it goes.
    source: the row whose exact cache holds its first slots; itself for none.
    start: how many these are.
    width: slots from there that are put into an exact cache (static); 0 for none.
  """
  run = model.run(request)
  canvas = started(run)
  canvas = canvas.replace(sound=jnp.ones_like(canvas.stopped))
  kept = None
  if model.sampler.cache == "block":
    kept = _cached(slots.canvas, source)
    known = jnp.arange(kept.key.shape[3])[:, None] < start
    clear = lambda x: jnp.where(known, x, 0)  # A row that failed holds NaN.
    kept = kept.replace(key=clear(kept.key), value=clear(kept.value))
    if width:
      kept = run.network.fill(canvas.z, request.valid, kept, start[None], width)
      canvas = canvas.replace(calls=canvas.calls + 1)
  one = jnp.ones((1,), bool)
  canvas = _put(slots.canvas, canvas.replace(cache=kept), row[None], one)
  requests = _set(slots.requests, request, row[None], one)
  return _placed(Slots(requests, canvas))


def advance(
  model: Model, slots: Slots, most: Int[Array, ""]
) -> tuple[Slots, View]:
  """Returns the rows after some network calls, at most so many, and how they are.

  Calls end as soon as a row is past a block.
  """
  run = model.run(slots.requests)

  def more(carry):
    count, canvas, gives = carry
    return (count < most) & ~gives & jnp.any(canvas.stage != IDLE)

  def body(carry):
    count, canvas, _ = carry
    after = _round(model, run, canvas)
    gives = jnp.any(after.block != canvas.block)
    return count + 1, after, gives

  carry = jnp.int32(0), _ready(run, slots.canvas), jnp.array(False)
  count, canvas, _ = lax.while_loop(more, body, carry)
  view = jax.tree.map(lambda x: constrain(x), _view(run, canvas, count))
  return _placed(slots.replace(canvas=canvas)), view


def _view(run: Run, canvas: Canvas, count: Int[Array, ""]) -> View:
  objective = run.sampler.objective
  tokens = objective.decode(run.process, canvas.z)
  begin = run.first(canvas.block)
  over = (canvas.stage == IDLE) & ~wanted(run, canvas)
  final = ~run.free | over[:, None]
  final |= run.network.batch.positions < begin[:, None]
  if run.sampler.policy.stands:
    final |= tokens != objective.mask_id
  return View(
    tokens=jnp.where(run.free, tokens, run.requests.tokens),
    final=final,
    over=over,
    sound=canvas.sound,
    calls=canvas.calls,
    kept=jnp.minimum(begin - run.network.lead, run.sampler.length),
    rounds=count,
  )


def _ready(run: Run, canvas: Canvas) -> Canvas:
  """Returns the canvas with all rows that are past a block in their next one.

  A block in which nothing is to be done is passed by.
  """
  waits = lambda canvas: (canvas.stage == IDLE) & wanted(run, canvas)

  def body(canvas):
    rows, window = waits(canvas), run.window(canvas)
    canvas = entered(run, canvas, window, rows)
    return left(run, canvas, window, rows & (canvas.stage == IDLE))

  return lax.while_loop(lambda c: jnp.any(waits(c)), body, canvas)


def _round(model: Model, run: Run, canvas: Canvas) -> Canvas:
  """Returns the canvas after a network call of every row that is in a block."""
  busy, window = canvas.stage != IDLE, run.window(canvas)
  rows = busy
  if run.network.approximate:
    every = run.sampler.calls_a_pass
    canvas = _passes(model, run, canvas, busy & (canvas.call % every == 0))
    rows = (canvas.stage != IDLE) & (canvas.call % every != 0)
  if run.sampler.cache != "none":
    # What others recompute beside it goes to the room behind the canvas.
    behind = run.sampler.length + run.network.lead
    behind += jnp.arange(window.slots.shape[1])
    at = jnp.where(rows[:, None], window.slots, behind)
    here = window._replace(slots=at, active=window.active & rows[:, None])
  else:
    here = window
  once = lambda carry: (
    jnp.array(False),
    step(run, carry[1], here, rows, False)[0],
  )
  some = lambda carry: carry[0]
  _, canvas = lax.while_loop(some, once, (jnp.any(rows), canvas))
  canvas = left(run, canvas, window, busy & (canvas.stage == IDLE))
  return _ready(run, canvas)


def _passes(
  model: Model, run: Run, canvas: Canvas, due: Bool[Array, "B"]
) -> Canvas:
  """Returns the canvas after the calls that make the caches of some rows anew.

  One row of each shard at a time: a pass over a canvas has work enough, and rows
  that are not due take no part.
  """
  count = due.shape[0]
  shards = axis_size(*BATCH_AXES)
  shards = shards if count % shards == 0 else 1

  def body(carry):
    due, canvas = carry
    grid = due.reshape(shards, -1)
    here = jnp.any(grid, axis=1)
    rows = jnp.arange(shards) * grid.shape[1] + jnp.argmax(grid, axis=1)
    part = model.run(_taken(run.requests, rows))._replace(head=run.head)
    those = _taken(canvas.replace(cache=None), rows)
    those = those.replace(cache=part.network.empty())
    after, _ = step(part, those, part.window(those), here, True)
    due = _set(due, jnp.zeros_like(here), rows, here)
    return due, _put(canvas, after, rows, here)

  return lax.while_loop(lambda c: jnp.any(c[0]), body, (due, canvas))[1]


def _taken(x: PyTree, rows: Int[Array, "R"]) -> PyTree:
  """Returns some rows of arrays."""
  return jax.tree.map(lambda x: x[rows], x)


def _set(x: PyTree, new: PyTree, rows: Int[Array, "R"], here) -> PyTree:
  """Returns arrays with new values in some rows, where they are here."""
  at = lambda x: jnp.where(here, rows, x.shape[0])
  return jax.tree.map(lambda x, y: x.at[at(x)].set(y, mode="drop"), x, new)


def _put(canvas: Canvas, new: Canvas, rows: Int[Array, "R"], here) -> Canvas:
  """Returns the canvas with some rows of another; a cache of None leaves its own."""
  rest = _set(canvas.replace(cache=None), new.replace(cache=None), rows, here)
  if new.cache is None:
    return rest.replace(cache=canvas.cache)
  store = lambda kept, new: _stored(
    kept, new, canvas.stage.shape[0], rows, here
  )
  cache = canvas.cache.replace(
    key=store(canvas.cache.key, new.cache.key),
    value=store(canvas.cache.value, new.cache.value),
  )  # The segments are said anew at each call.
  return rest.replace(cache=cache)


def _stored(kept, new, count: int, rows, here):
  """Returns kept `[N, B or 2B, ...]` with rows of new `[N, R or 2R, ...]`.

  One row is an update of a slice, which compilers make in place.
  """
  branches = range(kept.shape[1] // count)
  if len(rows) == 1:
    for branch in branches:
      own = new[:, branch : branch + 1]
      kept = lax.dynamic_update_slice_in_dim(
        kept, own, rows[0] + branch * count, axis=1
      )
    return kept
  at = jnp.concatenate([
    jnp.where(here, rows + branch * count, kept.shape[1]) for branch in branches
  ])
  return kept.at[:, at].set(new, mode="drop")


def _cached(canvas: Canvas, row: Int[Array, ""]) -> KVCache:
  """Returns what the cache holds of one row, of both branches with guidance."""
  count, cache = canvas.stage.shape[0], canvas.cache
  rows = row + count * jnp.arange(cache.key.shape[1] // count)
  return KVCache(
    key=cache.key[:, rows],
    value=cache.value[:, rows],
    segment_ids=cache.segment_ids[rows],
  )


def _placed(slots: Slots) -> Slots:
  """Returns the rows where they lie on a mesh: always at the same places."""
  cache = slots.canvas.cache
  if cache is not None:
    heads = lambda x: constrain(x, None, BATCH_AXES, TENSOR)
    cache = cache.replace(key=heads(cache.key), value=heads(cache.value))
    cache = cache.replace(segment_ids=constrain(cache.segment_ids, BATCH_AXES))
  canvas = slots.canvas.replace(cache=None)
  # A constant's type is weak until then, and the next call another program.
  rows = lambda x: constrain(x.astype(x.dtype), BATCH_AXES)
  requests, canvas = jax.tree.map(rows, (slots.requests, canvas))
  return Slots(requests, canvas.replace(cache=cache))

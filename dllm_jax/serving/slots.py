"""The sampling program cut at network calls: rows that are at different places.

    admit    a request into one row: its canvas; its prompt into an exact cache,
             less what another row's cache holds of it
    renew    rows whose approximate cache is due take a step with a pass over the
             canvas
    advance  all others take steps on their blocks, until some row is past its
             block or a number of calls is used up
    move     a row to another place

Pure functions of a state whose shapes never change; blocks, steps and policies are
those of `sampling.step`, where the rows of a batch wait for each other at each
block. No row reads another, so that a row has the tokens that it has there.
"""

import functools
import itertools
from typing import NamedTuple

from flax import struct
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from dllm_jax.core.axes import axis_size, BATCH_AXES, constrain, TENSOR
from dllm_jax.core.types import Denoiser, KVCache, Process
from dllm_jax.sampling.program import prepared
from dllm_jax.sampling.requests import Requests
from dllm_jax.sampling.sampler import Sampler
from dllm_jax.sampling.step import (
  Canvas,
  entered,
  IDLE,
  left,
  Run,
  started,
  step,
  wanted,
)


@struct.dataclass
class Slots:
  """Rows that requests come to and leave.

  Attributes:
    requests: what each was asked for; a free one has no slot in use.
    canvas: how far it is.
    calls: network calls so far, each for all rows that took part.
  """

  requests: Requests
  canvas: Canvas
  calls: Int[Array, ""]


@struct.dataclass
class View:
  """What the host is told of all rows.

  Attributes:
    tokens: the canvases; masks where nothing is drawn yet.
    final: slots that stay as they are.
    over: rows that have nothing more to sample.
    due: rows whose approximate cache is to be made anew.
    log_prob: of each token at the call that committed it, nats.
    top_ids: the likeliest tokens of that call, or None.
    top_log_probs: how likely they were.
    sound: rows whose network calls all gave numbers.
    calls: network calls of each row.
    kept: slots from the first whose keys and values are exact, and stay.
    total: network calls so far.
  """

  tokens: Int[Array, "B T"]
  final: Bool[Array, "B T"]
  over: Bool[Array, "B"]
  due: Bool[Array, "B"]
  sound: Bool[Array, "B"]
  calls: Int[Array, "B"]
  kept: Int[Array, "B"]
  total: Int[Array, ""]
  log_prob: Float[Array, "B T"]
  top_ids: Int[Array, "B T k"] | None
  top_log_probs: Float[Array, "B T k"] | None


class Model(NamedTuple):
  """What stays the same while rows come and go.

  Attributes:
    sampler: how they are sampled (static).
    denoiser: the network (static).
    params: its parameters, held (`Denoiser.hold`).
    process: the arrays of the objective.
  """

  sampler: Sampler
  denoiser: Denoiser
  params: PyTree
  process: Process

  def run(self, requests: Requests, beside: Run | None = None) -> Run:
    """Returns what the functions of `sampling.step` want.

    Args:
      requests: of some rows.
      beside: a run of other rows in the same program.
    """
    head = None if beside is None else beside.head
    # Each row has a seed of its own.
    return prepared(*self, None, requests, head=head)


def empty(model: Model, requests: Requests) -> Slots:
  """Returns rows that are all free; requests are as many blank ones."""
  canvas = started(model.run(requests))
  sound = jnp.ones_like(canvas.stopped)
  return _placed(Slots(requests, canvas.replace(sound=sound), jnp.int32(0)))


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
    # A row that failed holds NaN.
    clear = lambda x: jnp.where(jnp.arange(x.shape[3])[:, None] < start, x, 0)
    kept = kept.replace(
      key=jax.tree.map(clear, kept.key),
      value=jax.tree.map(clear, kept.value),
      slots=jax.tree.map(lambda x: jnp.where(start > 0, x, -1), kept.slots),
    )
    if width:
      kept = run.network.fill(canvas.z, request.valid, kept, start[None], width)
      canvas = canvas.replace(calls=canvas.calls + 1)
  canvas = _ready(run, canvas.replace(cache=kept))
  return _placed(
    Slots(
      _set(slots.requests, request, row[None], None),
      _put(slots.canvas, canvas, row[None], None),
      slots.calls + (width > 0),
    )
  )


def move(slots: Slots, source: Int[Array, ""], row: Int[Array, ""]) -> Slots:
  """Returns the slots with what is in one row in another one too."""
  canvas = _taken(slots.canvas.replace(cache=None), source[None])
  if slots.canvas.cache is not None:
    canvas = canvas.replace(cache=_cached(slots.canvas, source))
  requests = _taken(slots.requests, source[None])
  return _placed(
    slots.replace(
      requests=_set(slots.requests, requests, row[None], None),
      canvas=_put(slots.canvas, canvas, row[None], None),
    )
  )


def renew(model: Model, slots: Slots) -> Slots:
  """Returns the slots after the steps that make the caches of some rows anew.

  Of those that are due, two rows of each shard at a time, then the last one: a pass
  over canvases has work enough then, each needs a cache beside, and the others take
  no part.
  """
  run, canvas = model.run(slots.requests), slots.canvas
  busy, window = _due(run, canvas), run.window(canvas)
  count, shards = busy.shape[0], axis_size(*BATCH_AXES)
  shards = shards if count % shards == 0 else 1

  def body(width, carry):
    due, canvas, calls = carry
    grid = due.reshape(shards, -1)
    rows = jnp.argsort(~grid, axis=1, stable=True)[:, :width]
    here = jnp.take_along_axis(grid, rows, axis=1).reshape(-1)
    rows += jnp.arange(shards)[:, None] * grid.shape[1]
    rows = rows.reshape(-1)
    part = model.run(_taken(run.requests, rows), run)
    those = _taken(canvas.replace(cache=None), rows)
    those = those.replace(cache=part.network.empty())
    after = step(part, those, part.window(those), here, True)[0]
    due = _set(due, jnp.zeros_like(here), rows, here)
    canvas = _put(canvas, after, rows, None if shards == 1 else here)
    return due, canvas, calls + 1

  def more(width, carry):
    return jnp.any(jnp.sum(carry[0].reshape(shards, -1), axis=1) >= width)

  carry = busy, canvas, slots.calls
  for width in (2, 1) if count > shards else (1,):
    both = (functools.partial(fn, width) for fn in (more, body))
    carry = lax.while_loop(*both, carry)
  canvas = left(run, carry[1], window, busy & (carry[1].stage == IDLE))
  return _placed(slots.replace(canvas=_ready(run, canvas), calls=carry[2]))


def advance(
  model: Model, slots: Slots, most: Int[Array, ""], *, rows: int
) -> tuple[Slots, View]:
  """Returns the slots after some network calls, and how their rows are.

  Calls end as soon as a row is past a block, or due.

  Args:
    model: what stays the same.
    slots: the rows.
    most: network calls, at most.
    rows: how many rows take part, from the first (static).
  """
  first = lambda x: jax.tree.map(lambda x: x[:rows], x)
  run = model.run(first(slots.requests))
  cache = slots.canvas.cache
  if rows < slots.canvas.stage.shape[0] and cache is not None:
    cache = cache.replace(segment_ids=first(cache.segment_ids))
  canvas = first(slots.canvas.replace(cache=None)).replace(cache=cache)

  def more(carry):
    count, canvas, gives = carry
    return (count < most) & ~gives & jnp.any(_steps(run, canvas))

  def body(carry):
    count, canvas, _ = carry
    after = _stepped(run, canvas)
    gives = jnp.any(after.block != canvas.block) | jnp.any(_due(run, after))
    return count + 1, after, gives

  carry = jnp.int32(0), canvas, jnp.array(False)
  count, canvas, _ = lax.while_loop(more, body, carry)
  back = lambda x, new: x.at[:rows].set(new)
  if (cache := canvas.cache) is not None:
    cache = cache.replace(segment_ids=slots.canvas.cache.segment_ids)
  canvas = jax.tree.map(
    back, slots.canvas.replace(cache=None), canvas.replace(cache=None)
  )
  slots = Slots(
    slots.requests, canvas.replace(cache=cache), slots.calls + count
  )
  view = _view(model.run(slots.requests, run), slots)
  view = jax.tree.map(constrain, view)
  return _placed(slots), view


def _view(run: Run, slots: Slots) -> View:
  objective, canvas = run.sampler.objective, slots.canvas
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
    due=_due(run, canvas),
    sound=canvas.sound,
    calls=canvas.calls,
    kept=jnp.minimum(begin - run.network.lead, run.sampler.length),
    total=slots.calls,
    log_prob=canvas.log_prob,
    top_ids=canvas.top_ids,
    top_log_probs=canvas.top_log_probs,
  )


def _due(run: Run, canvas: Canvas) -> Bool[Array, "B"]:
  """Returns the rows whose next call makes an approximate cache anew."""
  if not run.network.approximate:
    return jnp.zeros_like(canvas.stopped)
  first = canvas.call % run.sampler.calls_a_pass == 0
  return (canvas.stage != IDLE) & first


def _steps(run: Run, canvas: Canvas) -> Bool[Array, "B"]:
  """Returns the rows whose next call is one on their block."""
  return (canvas.stage != IDLE) & ~_due(run, canvas)


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


def _stepped(run: Run, canvas: Canvas) -> Canvas:
  """Returns the canvas after a step of every row that takes one on its block."""
  rows, window = _steps(run, canvas), run.window(canvas)
  here = window
  if run.sampler.cache != "none":
    # What is computed of the other rows goes to the room behind the canvas.
    behind = run.sampler.length + run.network.lead
    behind += jnp.arange(window.slots.shape[1])
    at = jnp.where(rows[:, None], window.slots, behind)
    here = window._replace(slots=at, active=window.active & rows[:, None])
  canvas, _ = step(run, canvas, here, rows, False)
  canvas = left(run, canvas, window, rows & (canvas.stage == IDLE))
  return _ready(run, canvas)


def _taken(x: PyTree, rows: Int[Array, "R"]) -> PyTree:
  """Returns some rows of arrays."""
  return jax.tree.map(lambda x: x[rows], x)


def _set(x: PyTree, new: PyTree, rows: Int[Array, "R"], here) -> PyTree:
  """Returns arrays with new values in some rows, where they are here, or all."""
  at = lambda x: rows if here is None else jnp.where(here, rows, x.shape[0])
  return jax.tree.map(lambda x, y: x.at[at(x)].set(y, mode="drop"), x, new)


def _put(canvas: Canvas, new: Canvas, rows: Int[Array, "R"], here) -> Canvas:
  """Returns the canvas with some rows of another; a cache of None leaves its own."""
  rest = _set(canvas.replace(cache=None), new.replace(cache=None), rows, here)
  if new.cache is None:
    return rest.replace(cache=canvas.cache)
  store = lambda kept, new: _stored(
    kept, new, canvas.stage.shape[0], rows, here
  )
  # The segments are said anew at each call.
  return rest.replace(cache=canvas.cache.over_rows(store, new.cache))


def _stored(kept, new, count: int, rows, here):
  """Returns kept `[N, B or 2B, ...]` with rows of new `[N, R or 2R, ...]`.

  If all are here, a row is an update of a slice, which compilers make in place.
  """
  branches = range(kept.shape[1] // count)
  if here is None:
    for branch, i in itertools.product(branches, range(len(rows))):
      own = branch * len(rows) + i
      kept = lax.dynamic_update_slice_in_dim(
        kept, new[:, own : own + 1], rows[i] + branch * count, axis=1
      )
    return kept
  at = jnp.concatenate([
    jnp.where(here, rows + branch * count, kept.shape[1]) for branch in branches
  ])
  return kept.at[:, at].set(new, mode="drop")


def _cached(canvas: Canvas, row: Int[Array, ""]) -> KVCache:
  """Returns what the cache holds of one row, of both branches with guidance."""
  cache, count = canvas.cache, canvas.stage.shape[0]
  rows = row + jnp.arange(0, jax.tree.leaves(cache.key)[0].shape[1], count)
  cache = cache.replace(segment_ids=cache.segment_ids[rows])
  return cache.over_rows(lambda x: x[:, rows])


def _placed(slots: Slots) -> Slots:
  """Returns the rows where they lie on a mesh: always at the same places."""
  cache = slots.canvas.cache
  if cache is not None:
    heads = lambda x: constrain(x, None, BATCH_AXES, TENSOR)
    cache = cache.replace(
      key=jax.tree.map(heads, cache.key),
      value=jax.tree.map(heads, cache.value),
      segment_ids=constrain(cache.segment_ids, BATCH_AXES),
      slots=jax.tree.map(lambda x: constrain(x, BATCH_AXES), cache.slots),
    )
  canvas = slots.canvas.replace(cache=None)
  # A constant's type is weak until then, and the next call another program.
  rows = lambda x: constrain(x.astype(x.dtype), BATCH_AXES)
  requests, canvas = jax.tree.map(rows, (slots.requests, canvas))
  return slots.replace(requests=requests, canvas=canvas.replace(cache=cache))

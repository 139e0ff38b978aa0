"""The loops of the sampling program: over blocks, and over network calls.

Loops end as soon as no row needs them; with a trace they are scans, whose
arrays have one shape. Rows that are done wait, frozen.
"""

from collections.abc import Callable

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dllm_jax.sampling.step import (
  Canvas,
  entered,
  IDLE,
  left,
  Run,
  step,
  wanted,
)
from dllm_jax.sampling.traces.trace import Frame
from dllm_jax.sampling.window import Window


def prefilled(run: Run, canvas: Canvas) -> Canvas:
  """Returns the canvas with the prompts in its cache, if that is exact.

  To read one counts as a call, in however many pieces.
  """
  if run.sampler.cache != "block":
    return canvas
  given = run.first(canvas.block) - run.network.lead > 0
  cache = run.network.prefill(canvas.z, run.requests.valid, canvas.cache)
  return canvas.replace(cache=cache, calls=canvas.calls + given)


def blocks(run: Run, canvas: Canvas) -> tuple[Canvas, Frame | None]:
  """Samples all blocks, one after another; rows wait for each other."""
  count = run.sampler.blocks
  if run.trace:
    body = lambda canvas, _: _block(run, canvas)
    return lax.scan(body, canvas, length=count)
  if count == 1:
    return _block(run, canvas)
  more = lambda canvas: jnp.any(wanted(run, canvas))
  body = lambda canvas: _block(run, canvas)[0]
  return lax.while_loop(more, body, canvas), None


def _block(run: Run, canvas: Canvas) -> tuple[Canvas, Frame | None]:
  """Samples a block of every row; returns the canvas and the traced steps."""
  every = jnp.ones_like(canvas.stopped)
  window = run.window(canvas)
  canvas = entered(run, canvas, window, every)
  canvas, frames = _calls(run, canvas, window)
  return left(run, canvas, window, every), frames


def _calls(
  run: Run, canvas: Canvas, window: Window
) -> tuple[Canvas, Frame | None]:
  """Takes steps until no row of a block needs one; traced, as many as can be.

  An approximate cache is made anew by the first of every `refresh` steps. That is
  a loop in a loop, and not a condition: the cache would be copied for both sides.
  """
  most, every = run.sampler.most_calls, run.sampler.calls_a_pass
  call = lambda fresh: lambda canvas: _called(run, window, fresh, canvas)
  if not run.network.enters:
    return _repeat(run, call(False), canvas, most)

  def cycle(canvas):
    canvas, first = call(True)(canvas)
    if every == 1:
      return canvas, jax.tree.map(lambda x: x[None], first)
    canvas, rest = _repeat(run, call(False), canvas, every - 1)
    joined = lambda a, b: jnp.concatenate([a[None], b])
    return canvas, jax.tree.map(joined, first, rest)

  canvas, frames = _repeat(run, cycle, canvas, -(-most // every))
  flat = lambda x: x.reshape(-1, *x.shape[2:])[:most]
  return canvas, jax.tree.map(flat, frames)


def _repeat(run: Run, body: Callable, canvas: Canvas, most: int):
  """Returns the canvas and the frames of steps, of which there are at most some."""
  if run.trace:
    return lax.scan(lambda canvas, _: body(canvas), canvas, length=most)
  more = lambda carry: (carry[0] < most) & _busy(carry[1])
  once = lambda carry: (carry[0] + 1, body(carry[1])[0])
  return lax.while_loop(more, once, (jnp.int32(0), canvas))[1], None


def _busy(canvas: Canvas) -> Bool[Array, ""]:
  return jnp.any(canvas.stage != IDLE)


def _called(run: Run, window: Window, fresh: bool, canvas: Canvas):
  """Returns the canvas after one more call, and its frame; traced, if needed."""
  every = jnp.ones_like(canvas.stopped)
  body = lambda canvas: step(run, canvas, window, every, fresh)
  if not run.trace:
    return body(canvas)
  skip = lambda canvas: (canvas, _blank(run, canvas))
  return lax.cond(_busy(canvas), body, skip, canvas)


def finished(run: Run, canvas: Canvas) -> Int[Array, "B T"]:
  """Returns the tokens; after what ends a row, that token again, or the fill."""
  tokens = run.network.objective.decode(run.process, canvas.z)
  if run.ends is not None:
    ends = run.free & run.ended(tokens)
    after = jnp.cumsum(ends, axis=1) - ends > 0
    first = jnp.argmax(ends, axis=1, keepdims=True)
    end = jnp.take_along_axis(tokens, first, axis=1)
    if run.sampler.fill_id is not None:
      end = run.sampler.fill_id
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

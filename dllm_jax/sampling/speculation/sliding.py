"""The loop of sliding windows: rows at their own pointers, decided tokens kept.

A row's pointer is behind the tokens whose keys and values are kept. A call reads
what follows it, some decided tokens and as many masks as the window has, in the
order of decided tokens, then masks (`core.mask.decided_first`), and the pointer
moves over the decided ones that stood before the first mask: they saw decided
tokens alone, which is all that they would ever see (WeDLM, arXiv:2512.22737).
So tokens are those of calls that read the whole canvas, but for tokens that are
given behind a prompt, which are seen once the window reaches them.
"""

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dllm_jax.sampling.loop import prefilled
from dllm_jax.sampling.step import Canvas, IDLE, Run, RUNNING, step
from dllm_jax.sampling.traces.trace import Frame
from dllm_jax.sampling.window import gather, Window


def slide(run: Run, canvas: Canvas) -> tuple[Canvas, Frame | None]:
  """Samples all free slots behind each row's prompt."""
  canvas = prefilled(run, canvas)
  carry = canvas, run.first(canvas.block)
  body = lambda carry, _: _call(run, *carry)
  if run.trace:
    (canvas, _), frames = lax.scan(body, carry, length=run.sampler.length)
    return canvas, jax.tree.map(lambda x: x[None], frames)  # one block
  more = lambda carry: jnp.any(_running(run, carry[0]))
  return lax.while_loop(more, lambda c: body(c, None)[0], carry)[0], None


def _running(run: Run, canvas: Canvas) -> Bool[Array, "B"]:
  """Returns the rows that have a mask left, and no end before it."""
  masked = run.free & (canvas.z == run.sampler.objective.mask_id)
  return jnp.any(masked, axis=1) & ~canvas.stopped


def _call(run: Run, canvas: Canvas, at: Int[Array, "B"]):
  """Calls the network on what follows the pointers, and moves them on."""
  slots = at[:, None] + jnp.arange(run.sampler.wide)
  there = slots < run.sampler.length
  window = Window(slots, gather(run.free, slots) & there, None, False)
  running = _running(run, canvas)
  kept = _decided(run, canvas, window)
  canvas = canvas.replace(stage=jnp.where(running, RUNNING, IDLE))
  canvas, frame = step(run, canvas, window, jnp.ones_like(running), False)
  if run.ends is not None:
    tokens = gather(canvas.z, slots)
    ended = run.ended(tokens) & window.active & _decided(run, canvas, window)
    canvas = canvas.replace(stopped=canvas.stopped | jnp.any(ended, axis=1))
  moved = jnp.sum(kept & there, axis=1)
  return (canvas, jnp.where(running, at + moved, at)), frame


def _decided(run: Run, canvas: Canvas, window: Window) -> Bool[Array, "B W"]:
  """Returns the slots before a window's first mask."""
  masked = gather(canvas.z, window.slots) == run.sampler.objective.mask_id
  return jnp.cumsum(masked & window.active, axis=1) == 0

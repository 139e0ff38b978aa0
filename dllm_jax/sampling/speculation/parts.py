"""Calls inside a block, whose parts are filled one after another, with a cache.

Fast-dLLM v2's cache of sub-blocks (arXiv:2509.26328). With S the start of a row's
block, W its length, P the start of the part that is filled and w a part's length,

    whole  [S, S + W)   all keys and values of the block are made anew
    part   [P, P + w)   of the other parts those of the last whole call are seen

The first call in a part is whole, and so is each one while the part's first token
is masked: what predicts that lies in the part before. Each row is at a place of
its own. One that a call is not for is read behind the canvas, where there is room
for windows that end past it, so that what is kept of it stays as it is, and no
row's text depends on others. A call of either kind is left out where no row
needs it.
"""

from typing import Any

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dllm_jax.core.types import KVCache
from dllm_jax.sampling.window import gather, take, where, Window


def look(
  run: Any,
  canvas: Any,
  window: Window,
  t: Float[Array, "B 1"],
  visible: Bool[Array, "B T"],
  calling: Bool[Array, "B"],
) -> tuple[Float[Array, "R W D"], KVCache]:
  """Returns hidden states that predict a block, or a part of it, and the cache.

  Of a call of a part alone, those of the other parts are of no use.

  Args:
    run: what stays the same (`step.Run`).
    canvas: what goes from step to step (`step.Canvas`).
    window: the block of each row.
    t: the time that each row is at.
    visible: slots that may be seen now.
    calling: rows that need a call.
  """
  network, wide = run.network, window.slots.shape[1]
  width, shift = run.sampler.part, run.sampler.objective.shift
  at, whole = _due(run, canvas, window, width)
  rows, length = visible.shape
  behind = jnp.full((rows,), length)

  def some(chosen, start, width, offset, carry):
    """Calls the network for some rows, if there are any, on so many slots."""

    def body(carry):
      _, hidden, cache = carry
      own = jnp.where(chosen, start, behind)
      out, cache = network.at(canvas.z, t, own, width, visible, cache)
      # Slot j is predicted `shift` before it; the window's first one is known.
      index = jnp.arange(wide) - offset[:, None] - shift
      index = network.doubled(jnp.clip(index, 0, width - 1))
      new = gather(out.hidden, index)
      hidden = where(network.doubled(chosen), new, hidden)
      return jnp.array(False), hidden, cache

    # A loop of one round and not a condition, for which the cache would be copied.
    carry = jnp.any(chosen), *carry
    return lax.while_loop(lambda carry: carry[0], body, carry)[1:]

  hidden = run.head.hidden
  blank = jnp.zeros((rows, wide, hidden.shape[-1]), hidden.dtype)
  blank = network.doubled(blank)
  none = jnp.zeros_like(at)
  carry = some(calling & whole, window.start, wide, none, (blank, canvas.cache))
  return some(calling & ~whole, window.start + at, width, at, carry)


def _due(run, canvas, window, width):
  """Returns where in its block each row's part begins, and whose call is whole."""
  masked = take(canvas.z, window) == run.sampler.objective.mask_id
  index = jnp.arange(masked.shape[1])
  first = jnp.argmax(masked & window.active, axis=1)
  at = first // width * width
  inside = index // width == (at // width)[:, None]
  # A block's first token is that of the call that opens it.
  filled = (take(canvas.revealed_at, window) >= 0) & inside & (index > 0)
  return at, ~jnp.any(filled, axis=1) | (first == at)

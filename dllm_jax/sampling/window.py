"""Windows: the slots of each row that are worked on together.

Rows have their own pointers; slots past the end of the canvas are never read
for anything nor written.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree
import numpy as np


class Window(NamedTuple):
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

  @property
  def start(self) -> Int[Array, "B"]:
    """The first slot of each row's window."""
    return self.slots[:, 0]


class Tree(NamedTuple):
  """A call's window whose slots are not all in the order of the text.

  Attributes:
    ahead: how far behind the window's first position each slot stands.
    sees: which slots of the window (columns) each may attend to, of those that
      the mask lets it.
  """

  ahead: Int[np.ndarray, "W"]
  sees: Bool[np.ndarray, "W W"]


def where(mask: Bool[Array, "*n"], new: PyTree, old: PyTree) -> PyTree:
  """Returns new where the mask of leading axes is True, else old."""

  def leaf(a, b):
    return jnp.where(
      mask.reshape(mask.shape + (1,) * (a.ndim - mask.ndim)), a, b
    )

  return jax.tree.map(leaf, new, old)


def gather(x: PyTree, slots: Int[Array, "B W"]) -> PyTree:
  """Returns the given slots of each row; past the end, the last slot."""

  def leaf(x):
    inside = jnp.clip(slots, 0, x.shape[1] - 1)
    return jax.vmap(lambda row, at: row[at])(x, inside)

  return jax.tree.map(leaf, x)


def spread(seen: PyTree, window: Window, shape: tuple[int, int]) -> PyTree:
  """Returns what a window showed on the whole canvas, 0 elsewhere."""
  zeros = jax.tree.map(jnp.zeros_like, seen)
  blank = jax.tree.map(lambda x: jnp.zeros(shape, x.dtype), seen)
  return put(blank, window, where(window.active, seen, zeros))


def take(z: PyTree, window: Window) -> PyTree:
  """Returns the slots of a window."""
  return z if window.whole else gather(z, window.slots)


def put(z: PyTree, window: Window, new: PyTree) -> PyTree:
  """Returns z with a window replaced; none past the end."""
  if window.whole:
    return new

  def leaf(x, y):
    set_row = lambda row, at, values: row.at[at].set(values, mode="drop")
    return jax.vmap(set_row)(x, window.slots, y)

  return jax.tree.map(leaf, z, new)

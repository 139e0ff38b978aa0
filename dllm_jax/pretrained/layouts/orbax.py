"""Folders that Orbax wrote as published ones: a config, and tensors by name.

Other JAX code saves a tree of parameters, without a `config.json`. What it is
called there, and how its axes lie, is said by the family's own file (`gemma_jax`);
from here on it is a published folder like any other. Arrays are read whole, one
at a time, since that is how Orbax writes them.
"""

import collections
from collections.abc import Callable, Mapping
import dataclasses
import os
import threading
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dllm_jax.core import paths
from dllm_jax.core.paths import Path
from dllm_jax.pretrained import files
from dllm_jax.pretrained.layouts import gemma_jax

_HELD_BYTES = 2**30
_CONFIG, _TREE = "config.json", "_METADATA"


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
  """Returns the config of a published folder, or of what Orbax wrote.

  A `config.json` beside the arrays is heard before their shapes.

  Raises:
    FileNotFoundError: there is no folder, or no config.
    ValueError: it cannot be read, or the arrays are of no known network.
  """
  place = paths.place(folder)
  if not _written_by_orbax(place) or (place / _CONFIG).is_file():
    return files.read_config(folder)
  shapes = {key: leaf.shape for key, leaf in _leaves(place).items()}
  return gemma_jax.config(shapes, place)


def read_tensors(folder: str | os.PathLike) -> Mapping[str, Any]:
  """Returns the tensors of a folder by their published names; none is read yet.

  Raises:
    FileNotFoundError: there are no weights.
    ValueError: a file is damaged, or an array is of no known network.
  """
  place = paths.place(folder)
  if not _written_by_orbax(place):
    return files.read_tensors(folder)
  leaves, arrays = _leaves(place), _Arrays(place)
  shapes = {key: leaf.shape for key, leaf in leaves.items()}
  return {
    one.name: Turned(
      file=place / _TREE,
      name=one.name,
      shape=one.shape,
      dtype=np.dtype(leaves[one.source].dtype),
      make=one.turn,
      leaf=leaves[one.source].path,
      arrays=arrays,
    )
    for one in gemma_jax.tensors(shapes, place)
  }


def _written_by_orbax(folder: Path) -> bool:
  return (folder / _TREE).is_file()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Leaf:
  """An array of a checkpoint: its keys from the root, shape and type."""

  path: tuple[str, ...]
  shape: tuple[int, ...]
  dtype: Any


def _leaves(folder: Path) -> dict[str, _Leaf]:
  """Returns the arrays of a checkpoint by their keys, joined by slashes."""
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    tree = checkpointer.metadata(folder).item_metadata
  found = jax.tree_util.tree_leaves_with_path(getattr(tree, "tree", None))
  if not found:
    raise ValueError(
      f"{folder} was written by Orbax, but its tree of parameters cannot be read:"
      " copy it again, whole"
    )
  leaves = {}
  for keys, one in found:
    path = tuple(str(key.key) for key in keys)
    shape, dtype = tuple(one.shape), one.dtype
    leaves["/".join(path)] = _Leaf(path=path, shape=shape, dtype=dtype)
  return leaves


class _Arrays:
  """Arrays of a checkpoint as published tensors; the last few are kept."""

  def __init__(self, folder: Path):
    self._folder = folder
    self._held: collections.OrderedDict[str, np.ndarray] = (
      collections.OrderedDict()
    )
    self._lock = threading.Lock()

  def get(self, one: "Turned") -> np.ndarray:
    """Returns a tensor in its published layout."""
    with self._lock:
      if one.name not in self._held:
        array = np.ascontiguousarray(one.make(self._read(one.leaf)))
        self._held[one.name] = array
        self._forget(array.nbytes)
      self._held.move_to_end(one.name)
      return self._held[one.name]

  def _forget(self, newest: int) -> None:
    # Two of the largest: threads are at the end of one and the next's beginning.
    most = max(_HELD_BYTES, 2 * newest)
    while sum(array.nbytes for array in self._held.values()) > most:
      self._held.popitem(last=False)

  def _read(self, path: tuple[str, ...]) -> np.ndarray:
    def nested(leaf):
      for key in reversed(path):
        leaf = {key: leaf}
      return leaf

    wanted = ocp.args.PyTreeRestore(
      item=nested(0),
      restore_args=nested(ocp.RestoreArgs(restore_type=np.ndarray)),
      partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      (array,) = jax.tree.leaves(checkpointer.restore(self._folder, wanted))
    return array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turned:
  """A published tensor that is made of an array of a checkpoint.

  Attributes:
    file: the checkpoint's list of arrays, for messages.
    name: the tensor's published name.
    shape: its shape.
    dtype: the type of its numbers.
    make: the array to the tensor.
    leaf: the array's keys.
    arrays: what reads it.
  """

  file: Path
  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[np.ndarray], np.ndarray] = dataclasses.field(repr=False)
  leaf: tuple[str, ...]
  arrays: _Arrays = dataclasses.field(repr=False)

  def __getitem__(self, rows: slice) -> np.ndarray:
    """Returns rows of the tensor (of its first axis)."""
    return self.arrays.get(self)[rows]

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    """Returns the whole tensor."""
    return self.arrays.get(self).astype(dtype or self.dtype, copy=False)

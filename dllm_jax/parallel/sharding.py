"""Where arrays lie on the mesh: ordered rules for parameters, one for batches.

A rule is a regular expression for the whole path of an array, such as
'params/model/layers/mlp/up/kernel', and a `PartitionSpec`. The first rule that
matches wins and the last one catches everything. Default rules begin with
'(.*/)?', so that they hold for bare parameters, a train state, averaged
parameters and every optimizer statistic of the same shape alike.
"""

from collections.abc import Sequence
import functools
import math
import re
from typing import NamedTuple

import jax
from jaxtyping import PyTree
import numpy as np

from dllm_jax.core.axes import BATCH_AXES, CONTEXT, EXPERT, FSDP, TENSOR

Rule = tuple[str, jax.sharding.PartitionSpec]

RULES: tuple[Rule, ...] = tuple(
  (f"(.*/)?{path}" if path != ".*" else path, jax.P(*spec))
  for path, spec in (
    ("embed/embedding", (TENSOR, FSDP)),
    ("unembed/kernel", (FSDP, TENSOR)),
    ("unembed/bias", (TENSOR,)),
    ("layers/attention/[qkv]/kernel", (None, FSDP, TENSOR, None)),
    ("layers/attention/[qkv]/bias", (None, TENSOR, None)),
    ("layers/attention/o/kernel", (None, TENSOR, None, FSDP)),
    ("layers/mlp/(gate|up)/kernel", (None, FSDP, TENSOR)),
    ("layers/mlp/(gate|up)/bias", (None, TENSOR)),
    ("layers/mlp/down/kernel", (None, TENSOR, FSDP)),
    ("layers/mlp/shared/(gate|up)/kernel", (None, FSDP, TENSOR)),
    ("layers/mlp/shared/down/kernel", (None, TENSOR, FSDP)),
    ("layers/(mlp|routed)/experts/(gate|up)", (None, EXPERT, FSDP, TENSOR)),
    ("layers/(mlp|routed)/experts/down", (None, EXPERT, TENSOR, FSDP)),
    ("layers/(mlp|routed)/router/kernel", (None, FSDP, None)),
    ("self_conditioning/mlp/(gate|up)/kernel", (FSDP, TENSOR)),
    ("self_conditioning/mlp/down/kernel", (TENSOR, FSDP)),
    ("layers/modulation/kernel", (None, None, FSDP)),
    ("final_modulation/kernel", (None, FSDP)),
    ("(en|de)coder/(down|up|mid).*/kernel", (None, None, None, FSDP)),
    (".*/lora_a", (None, FSDP, None)),
    (".*/lora_b", (None, None, FSDP)),
    (".*/lora_magnitude", (None, FSDP)),
    (".*", ()),
  )
)
"""The placement of the networks in `models`."""

_HELD = re.compile(r"(?<=/kernel)/(qvalue|scale)$")
_LARGE = 4 * 2**20  # bytes


def shardings(
  tree: PyTree,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  rules: Sequence[Rule] = RULES,
) -> PyTree:
  """Returns the sharding of each array in a tree.

  An array with one dimension less than the parameter whose path ends its own (a
  factored statistic) lies as the parameter does in the others; one with fewer
  dimensions than its rule names (a placeholder) is replicated.

  Args:
    tree: arrays or `jax.ShapeDtypeStruct`s: parameters or a whole train state.
    mesh: the mesh; names that it lacks are left out.
    rules: ordered (regular expression, PartitionSpec).

  Raises:
    ValueError: if no rule matches, if a dimension does not divide, or if an
      array above 4 MiB stays whole by its rule though parameters are divided.
  """
  compiled = [(re.compile(pattern), spec) for pattern, spec in rules]
  shapes = {
    _name(path).removeprefix("params/"): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    if _name(path).startswith("params/")
  }

  def place(key_path, leaf):
    path = _name(key_path)
    held = _HELD.search(path)  # a matrix in few bits lies as it would whole
    spec = _match(compiled, path[: held.start()] if held else path)
    if len(spec) > len(leaf.shape):
      parameter = next((s for p, s in shapes.items() if path.endswith(p)), ())
      spec = _without_one(spec, parameter, leaf.shape)
    spec = jax.P(*(_present(names, mesh) for names in spec))
    if held and held[1] == "scale":
      # Of few tiles, what a mesh does not divide is small enough to repeat.
      sizes = zip(leaf.shape, spec, strict=False)
      spec = jax.P(*(None if n % _parts(a, mesh) else a for n, a in sizes))
    _check(path, leaf, spec, mesh)
    return jax.sharding.NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(place, tree)


def _name(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _without_one(spec, parameter, shape):
  """Returns a parameter's spec without the dimension that `shape` lacks."""
  spec = (*spec, *[None] * (len(parameter) - len(spec)))
  for axis in reversed(range(len(parameter))):
    if parameter[:axis] + parameter[axis + 1 :] == shape:
      return jax.P(*spec[:axis], *spec[axis + 1 :])
  return jax.P()


def _match(compiled, path):
  for pattern, spec in compiled:
    if pattern.fullmatch(path):
      return spec
  raise ValueError(
    f"no sharding rule matches {path!r}; end the rules with ('.*', P())"
  )


def _present(names, mesh):
  names = (names,) if isinstance(names, str) else names or ()
  names = tuple(name for name in names if name in mesh.shape)
  return names[0] if len(names) == 1 else names or None


def _parts(names, mesh) -> int:
  names = (names,) if isinstance(names, str) else names or ()
  return math.prod(mesh.shape[name] for name in names)


def _check(path, leaf, spec, mesh):
  for axis, names in enumerate(spec):
    parts = _parts(names, mesh)
    if leaf.shape[axis] % parts:
      raise ValueError(
        f"{path}: dimension {axis} of shape {tuple(leaf.shape)} does not"
        f" divide over mesh axis {names} of size {parts}; change the mesh or"
        " the model"
      )
  size = math.prod(leaf.shape) * leaf.dtype.itemsize
  axes = tuple(a for a in (FSDP, TENSOR, EXPERT) if a in mesh.shape)
  divided = _parts(axes, mesh)
  # A rule that names an axis is a choice, though this mesh has one device on it.
  if not any(spec) and divided > 1 and size > _LARGE:
    raise ValueError(
      f"{path}: {size / 2**20:.1f} MiB would be replicated on a mesh that"
      f" divides parameters by {divided}; add a sharding rule for this path"
    )


def batch_sharding(mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
  """Returns the sharding of `[B, L]` arrays: rows, then positions."""
  return jax.sharding.NamedSharding(mesh, jax.P(BATCH_AXES, CONTEXT))


class RowShare(NamedTuple):
  """Which rows of a batch a process holds.

  Attributes:
    index: its number among the processes that hold different rows.
    count: the number of those.
    blocks: where its rows lie, counted in a device's rows.
  """

  index: int
  count: int
  blocks: tuple[int, ...]


@functools.cache
def row_share(mesh: jax.sharding.Mesh) -> RowShare:
  """Returns which rows of each batch this process reads.

  Processes whose devices hold the same rows (parts of a network, or of their
  positions) read the same ones.

  Raises:
    ValueError: the rows of two processes overlap in part.
  """
  owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
  axes = [mesh.axis_names.index(a) for a in BATCH_AXES if a in mesh.shape]
  owners = np.moveaxis(owners, axes, range(len(axes)))
  blocks = owners.reshape(_parts(BATCH_AXES, mesh), -1)
  return _share(blocks, jax.process_index())


def _share(owners: np.ndarray, process: int) -> RowShare:
  """Returns a process's share, given who owns `[blocks, devices]`."""
  held = {
    int(p): tuple(map(int, np.flatnonzero((owners == p).any(axis=1))))
    for p in np.unique(owners)
  }
  shares = sorted(set(held.values()))
  if len({len(s) for s in shares}) > 1 or sum(map(len, shares)) != len(owners):
    raise ValueError(
      f"the mesh divides rows into {len(owners)} blocks, of which processes "
      f"hold {', '.join(map(str, map(list, shares)))}; choose axis sizes that "
      "give each process blocks of its own, or those of another"
    )
  mine = held[process]
  return RowShare(shares.index(mine), len(shares), mine)


def global_batch(batch: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
  """Returns global arrays of a batch of which each process holds its own rows.

  Args:
    batch: a pytree of numpy arrays, `[B, L, ...]` or `[B]`, with this process's
      share of the rows, see `row_share`; None leaves stay None.
    mesh: the mesh.

  Raises:
    ValueError: if the mesh does not divide the rows or the positions.
  """
  rows, context = _parts(BATCH_AXES, mesh), _parts(CONTEXT, mesh)
  sharding = batch_sharding(mesh)
  by_row = jax.sharding.NamedSharding(mesh, jax.P(BATCH_AXES))
  share = row_share(mesh)

  def place(leaf):
    leaf = np.asarray(leaf)
    total = leaf.shape[0] * share.count
    if total % rows:
      raise ValueError(
        f"a batch of {total} rows does not divide over the {rows} devices of"
        f" mesh axes {', '.join(BATCH_AXES)}; change the batch size or the"
        " mesh"
      )
    if leaf.ndim > 1 and leaf.shape[1] % context:
      raise ValueError(
        f"rows of {leaf.shape[1]} positions do not divide over mesh axis"
        f" context of size {context}; change the length or the mesh"
      )
    size = total // rows

    def part(index):
      start = share.blocks.index((index[0].start or 0) // size) * size
      return leaf[(slice(start, start + size), *index[1:])]

    return jax.make_array_from_callback(
      (total, *leaf.shape[1:]), sharding if leaf.ndim > 1 else by_row, part
    )

  # The one copy to the devices that a loop over steps is meant to make.
  with jax.transfer_guard_host_to_device("allow"):
    return jax.tree.map(place, batch)

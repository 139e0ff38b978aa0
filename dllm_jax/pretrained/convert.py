"""Published tensors to our parameters and back, by one declarative name table.

A table says once, for each of our parameters, which published tensor holds it
and how; both directions read it. Nothing is guessed: every tensor is used or
named as unused, every parameter is set, anything else is an error. Tables of
the families are in `names`; files are read and written elsewhere.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np

from dllm_jax.core.types import Denoiser, ModelInputs

LAYER = "{i}"


@dataclasses.dataclass(frozen=True)
class Name:
  """Where one published tensor goes.

  Attributes:
    theirs: its name; "{i}" stands for the layer, and our arrays are then
      stacked over layers on their first axis.
    ours: path of the parameter; several for a fused tensor, whose rows (axis 0)
      are theirs in this order.
    contracts: leading axes of ours that a matrix product contracts; the
      published matrix is then (out, in), ours the transpose with heads written
      out. 0 for what is stored alike.
    vocabulary: its rows are token ids; ours has padded rows, zero at first.
  """

  theirs: str
  ours: str | tuple[str, ...]
  contracts: int = 0
  vocabulary: bool = False

  @property
  def paths(self) -> tuple[str, ...]:
    """Our paths, always as a tuple."""
    return (self.ours,) if isinstance(self.ours, str) else self.ours


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
  """The names of a family.

  Attributes:
    family: what errors call it.
    network: the network of a config, whose parameters are to be filled.
    names: where each tensor goes; those whose parameters the config lacks are
      not expected.
    prefixes: what published names may begin with, besides nothing.
    tied: (tensor, tensor) that are equal where embeddings are tied: the first
      is a copy of the second.
    derived: tensors that follow from the config, checked and written again.
    ignored: regular expressions of tensors that carry nothing.
  """

  family: str
  network: Callable[[Any], Denoiser]
  names: tuple[Name, ...]
  prefixes: tuple[str, ...] = ()
  tied: tuple[str, str] | None = None
  derived: Mapping[str, Callable[[Any], np.ndarray]] = dataclasses.field(
      default_factory=dict
  )
  ignored: tuple[str, ...] = ()


class Converted(NamedTuple):
  """Parameters in our layout, and what they came from.

  Attributes:
    params: nested dict of numpy arrays (or of what `put` returned).
    used: names of the tensors that were read.
    unused: names of the tensors that carry nothing new.
    prefix: what the published names began with.
  """

  params: PyTree
  used: tuple[str, ...]
  unused: tuple[str, ...]
  prefix: str


def to_ours(
    table: Table,
    tensors: Mapping[str, np.ndarray],
    config: Any,
    *,
    put: Callable[[str, np.ndarray], Any] = lambda path, array: array,
) -> Converted:
  """Returns our parameters, filled from published tensors.

  Parameters are made one after another, so that a lazy mapping and a `put` that
  moves each to its devices keep the host's memory small.

  Args:
    table: the family's names.
    tensors: published tensors by name; read by key, possibly more than once.
    config: the network's config.
    put: `(path, array) -> array`, called with each finished parameter.

  Raises:
    ValueError: for a tensor that is missing, unknown or of another shape.
  """
  prefix = _prefix(table, tensors)
  shapes = _shapes(table, config)
  names = {path: name for name in table.names for path in name.paths}
  used, flat = {}, {}
  for path, leaf in shapes.items():
    if path not in names:
      raise ValueError(f"{table.family}: the name table lacks parameter {path}")
    name = names[path]
    keys = _keys(name, leaf.shape, prefix)
    missing = [key for key in keys if key not in tensors]
    if missing:
      raise ValueError(
          f"{table.family}: tensor {missing[0]} is missing, which parameter"
          f" {path} needs; check that the config describes these weights"
      )
    parts = [
        _read(name, path, key, tensors[key], shapes, config) for key in keys
    ]
    used.update(dict.fromkeys(keys))
    array = np.stack(parts) if LAYER in name.theirs else parts[0]
    flat[path] = put(path, array)
  unused = [key for key in tensors if key not in used]
  for key in unused:
    _check_unused(table, key.removeprefix(prefix), tensors, prefix, config)
  return Converted(_unflatten(flat), tuple(used), tuple(unused), prefix)


def to_theirs(
    table: Table, params: PyTree, config: Any, *, prefix: str = ""
) -> dict[str, np.ndarray]:
  """Returns published tensors by name, the inverse of `to_ours`.

  Args:
    table: the family's names.
    params: our parameters.
    config: the network's config.
    prefix: what the names begin with.

  Raises:
    ValueError: if a parameter is absent or has another shape.
  """
  shapes = _shapes(table, config)
  flat = _flatten(params)
  for path, leaf in shapes.items():
    if path not in flat or flat[path].shape != leaf.shape:
      found = flat[path].shape if path in flat else "absent"
      raise ValueError(
          f"{table.family}: parameter {path} must be {leaf.shape}, not {found}"
      )
  tensors = {}
  for name in table.names:
    if not set(name.paths) <= set(shapes):
      continue
    arrays = [np.asarray(flat[path]) for path in name.paths]
    if LAYER not in name.theirs:
      tensors[prefix + name.theirs] = _write(name, arrays, config)
      continue
    for i in range(len(arrays[0])):
      key = prefix + name.theirs.replace(LAYER, str(i))
      tensors[key] = _write(name, [array[i] for array in arrays], config)
  if table.tied and getattr(config, "tied", False):
    copy, source = table.tied
    tensors[prefix + copy] = tensors[prefix + source]
  for key, make in table.derived.items():
    tensors[prefix + key] = make(config)
  return tensors


def _prefix(table, tensors) -> str:
  for prefix in table.prefixes:
    if any(key.startswith(prefix) for key in tensors):
      return prefix
  return ""


def _shapes(table, config) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shape of every parameter of the network by path."""
  ones = jnp.ones((1, 1), jnp.int32)
  inputs = ModelInputs(latent=ones, positions=ones, segment_ids=ones)
  init = table.network(config).init
  return _flatten(jax.eval_shape(init, jax.random.key(0), inputs))


def _flatten(tree) -> dict[str, Any]:
  return {
      jax.tree_util.keystr(path, simple=True, separator="/"): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _unflatten(flat):
  tree = {}
  for path, leaf in flat.items():
    *parents, last = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree


def _keys(name, shape, prefix) -> list[str]:
  """Returns the published tensors of one parameter: one a layer, or one."""
  if LAYER not in name.theirs:
    return [prefix + name.theirs]
  return [
      prefix + name.theirs.replace(LAYER, str(i)) for i in range(shape[0])
  ]


def _layer_shape(name, path, shapes) -> tuple[int, ...]:
  shape = shapes[path].shape
  return shape[1:] if LAYER in name.theirs else shape


def _their_shape(name, path, shapes, config) -> tuple[int, ...]:
  """Returns the published shape of the rows that hold one parameter."""
  shape = _layer_shape(name, path, shapes)
  if name.contracts:
    inputs = math.prod(shape[: name.contracts])
    shape = (math.prod(shape) // inputs, inputs)
  if name.vocabulary:
    shape = (config.vocab_size, *shape[1:])
  return shape


def _read(name, path, key, tensor, shapes, config):
  """Returns one parameter (of one layer) from the tensor that holds it."""
  wanted = [_their_shape(name, p, shapes, config) for p in name.paths]
  rows = [shape[0] for shape in wanted]
  if tensor.shape != (sum(rows), *wanted[0][1:]):
    raise ValueError(
        f"tensor {key} has shape {tuple(tensor.shape)}, but the config gives"
        f" {(sum(rows), *wanted[0][1:])}; check that it describes these weights"
    )
  index = name.paths.index(path)
  part = tensor[sum(rows[:index]) : sum(rows[: index + 1])]
  if name.vocabulary:
    padding = config.padded_vocab - len(part)
    part = np.pad(part, [(0, padding)] + [(0, 0)] * (part.ndim - 1))
  if name.contracts:
    part = part.T
  return part.reshape(_layer_shape(name, path, shapes))


def _write(name, arrays, config):
  """Returns the published tensor that holds these parameters of one layer."""
  parts = []
  for array in arrays:
    if name.contracts:
      inputs = math.prod(array.shape[: name.contracts])
      array = array.reshape(inputs, -1).T
    parts.append(array[: config.vocab_size] if name.vocabulary else array)
  return np.ascontiguousarray(
      np.concatenate(parts) if len(parts) > 1 else parts[0]
  )


def _check_unused(table, key, tensors, prefix, config):
  """Raises ValueError unless a tensor that was not read carries nothing new."""
  tensor = tensors[prefix + key if prefix + key in tensors else key]
  if table.tied and key == table.tied[0] and config.tied:
    if not np.array_equal(tensor, tensors[prefix + table.tied[1]]):
      raise ValueError(
          f"tensor {key} differs from {table.tied[1]}, but the config ties"
          " them; set tied=False"
      )
    return
  if key in table.derived:
    expected = table.derived[key](config)
    if tensor.shape != expected.shape or not np.allclose(
        np.asarray(tensor, np.float32), expected, rtol=1e-2
    ):
      raise ValueError(
          f"tensor {key} does not follow from the config; check its sizes and"
          " rope_theta"
      )
    return
  if not any(re.fullmatch(pattern, key) for pattern in table.ignored):
    raise ValueError(
        f"tensor {key} has no place in a {table.family} network of this config;"
        " check that the config describes these weights"
    )

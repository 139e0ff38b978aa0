"""Name tables: for each parameter of ours, the published tensors that hold it.

Only shapes and names are known here; `convert` moves the numbers and `names`
has the tables of the families.
"""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np

from dllm_jax.core.types import Denoiser, ModelInputs

LAYER, EXPERT = "{i}", "{e}"


@dataclasses.dataclass(frozen=True)
class Name:
  """Where one published tensor goes.

  Attributes:
    theirs: its name; "{i}" stands for the layer and "{e}" for the expert, and
      our arrays are then stacked over them on their first axes.
    ours: path of the parameter; several for a fused tensor, whose rows (axis 0)
      are theirs in this order. A path that begins with "layers/" is looked up
      in each stack of layers.
    contracts: leading axes of ours that a matrix product contracts; the
      published matrix is then (out, in), ours the transpose with heads written
      out. 0 for what is stored alike, heads apart.
    kept: last axes of ours that stay axes: 1 for an embedding.
    vocabulary: its rows are token ids; ours has padded rows, zero at first.
    fused: its first axis is the experts', each of which has rows and columns as
      above; ours is stacked over them.
  """

  theirs: str
  ours: str | tuple[str, ...]
  contracts: int = 0
  kept: int = 0
  vocabulary: bool = False
  fused: bool = False

  @property
  def paths(self) -> tuple[str, ...]:
    """Our paths, always as a tuple."""
    return (self.ours,) if isinstance(self.ours, str) else self.ours

  @property
  def stacked(self) -> int:
    """How many first axes of ours are the layer and the expert."""
    return (LAYER in self.theirs) + (EXPERT in self.theirs or self.fused)


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
    copies: (regular expression, what its matches are copies of), likewise.
    carried: regular expressions of tensors that no parameter holds, which are
      written again as they were.
    derived: tensors that follow from the config, checked and written again.
    ignored: regular expressions of tensors that carry nothing.
  """

  family: str
  network: Callable[[Any], Denoiser]
  names: tuple[Name, ...]
  prefixes: tuple[str, ...] = ()
  tied: tuple[str, str] | None = None
  copies: tuple[tuple[str, str], ...] = ()
  carried: tuple[str, ...] = ()
  derived: Mapping[str, Callable[[Any], np.ndarray]] = dataclasses.field(
    default_factory=dict
  )
  ignored: tuple[str, ...] = ()

  def original(self, name: str) -> str | None:
    """Returns the tensor that one of this name is a copy of, or None."""
    if self.tied and name == self.tied[0]:
      return self.tied[1]
    for pattern, original in self.copies:
      found = re.fullmatch(pattern, name)
      if found:
        return found.expand(original)
    return None

  def carries(self, name: str) -> bool:
    """Whether a tensor goes through as it is."""
    return any(re.fullmatch(pattern, name) for pattern in self.carried)


@dataclasses.dataclass(frozen=True)
class Place:
  """Where one parameter lies in published tensors.

  Attributes:
    path: its path.
    shape: its shape.
    name: its entry in the table.
    layers: the number of each layer of its stack.
    before: rows of the published tensor (of an expert) before its own.
    rows: rows of its own; padded rows of ours are not among them.
    group: rows that each expert has in all, where they are fused.
  """

  path: str
  shape: tuple[int, ...]
  name: Name
  layers: tuple[int, ...]
  before: int
  rows: int
  group: int = 0

  @property
  def inner(self) -> tuple[int, ...]:
    """The shape of one layer (and expert)."""
    return self.shape[self.name.stacked :]

  @property
  def ins(self) -> tuple[int, ...]:
    """The axes that a product contracts."""
    return self.inner[: self.name.contracts]

  @property
  def kept(self) -> tuple[int, ...]:
    """The axes that follow the rows in both layouts."""
    return self.inner[len(self.inner) - self.name.kept :]

  @property
  def outs(self) -> tuple[int, ...]:
    """The other axes; their product is the rows of the published tensor."""
    return self.inner[self.name.contracts : len(self.inner) - self.name.kept]

  @property
  def their_rest(self) -> tuple[int, ...]:
    """The published shape after its rows."""
    return (math.prod(self.ins),) if self.name.contracts else self.kept

  def key(self, index: tuple[int, ...]) -> str:
    """Returns the published name of one layer (and expert)."""
    marks = [m for m in (LAYER, EXPERT) if m in self.name.theirs]
    key = self.name.theirs
    for mark, i in zip(marks, index, strict=not self.name.fused):
      key = key.replace(mark, str(self.layers[i] if mark == LAYER else i))
    return key

  def start(self, index: tuple[int, ...]) -> int:
    """Returns the rows before those of one layer and expert, of all experts'."""
    return self.before + (index[-1] * self.group if self.name.fused else 0)

  def keys(self) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields (published name, index in the stack)."""
    stack = self.shape[: self.name.stacked]
    for index in itertools.product(*map(range, stack)):
      yield self.key(index), index


@dataclasses.dataclass(frozen=True)
class Region:
  """A parameter of ours that can be read by parts.

  Attributes:
    path: its path.
    shape: its shape.
    dtype: its type.
    read: `(slices of all axes) -> array`.
  """

  path: str
  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[tuple[slice, ...]], np.ndarray]

  def whole(self) -> np.ndarray:
    """Returns all of it."""
    return self.read((slice(None),) * len(self.shape))


def places_of(table: Table, config: Any) -> dict[str, Place]:
  """Returns where each parameter of the network lies, in the network's order.

  Raises:
    ValueError: the table says nothing of one.
  """
  found = shapes(table, config)
  stacks = [
    (f"{run.name}/" if run.name else "", run.numbers) for run in config.runs
  ]
  places = {}
  for name in table.names:
    layered = name.paths[0].startswith("layers/")
    for stack, numbers in stacks if layered else [("", ())]:
      paths = [stack + path for path in name.paths]
      if not set(paths) <= set(found):
        continue
      before = 0
      for path in paths:
        one = Place(path, found[path].shape, name, numbers, before, 0)
        rows = config.vocab_size if name.vocabulary else math.prod(one.outs)
        places[path] = dataclasses.replace(one, rows=rows)
        before += rows
      for path in paths if name.fused else ():
        places[path] = dataclasses.replace(places[path], group=before)
  for path in found:
    if path not in places:
      raise ValueError(f"{table.family}: the name table lacks parameter {path}")
  return {path: places[path] for path in found}


def expected(places: Mapping[str, Place]) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every published tensor that is read."""
  found: dict[str, tuple[int, ...]] = {}
  for one in places.values():
    for key, index in one.keys():
      shape = (one.rows, *one.their_rest)
      if one.name.fused:
        shape = (index[-1] + 1, one.group, *one.their_rest)
      elif key in found:
        shape = (found[key][0] + one.rows, *one.their_rest)
      found[key] = shape
  return found


def parameters(table: Table, config: Any) -> int:
  """Returns the number of published parameters; tied ones count once."""
  return sum(
    math.prod(shape) for shape in expected(places_of(table, config)).values()
  )


def shapes(table: Table, config: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shape of every parameter of the network by path."""
  return dict(_shapes(table.network, config))


# A second to trace, and asked for by each step of an import.
@functools.lru_cache(maxsize=8)
def _shapes(network: Callable[[Any], Denoiser], config: Any) -> dict[str, Any]:
  ones = jnp.ones((1, 1), jnp.int32)
  inputs = ModelInputs(latent=ones, positions=ones, segment_ids=ones)
  init = network(config).init
  return flatten(jax.eval_shape(init, jax.random.key(0), inputs))


def flatten(tree: PyTree) -> dict[str, Any]:
  """Returns the leaves of a tree by path."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the tree of leaves by path."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, last = path.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree

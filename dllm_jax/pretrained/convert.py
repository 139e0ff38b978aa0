"""Published tensors to our parameters and back, by one declarative name table.

A table says once, for each of our parameters, which published tensors hold it
and how; both directions read it. Nothing is guessed: every tensor is used or
named as unused, every parameter is set, anything else is an error, found before
a number is read. Parameters are read by regions (a device's shard), a few rows
at a time. Tables are in `names`, bytes on disk in `files`.
"""

from collections.abc import Callable, Mapping
from concurrent import futures
import itertools
import math
import os
import re
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np

from dllm_jax.pretrained.files import (
  by_rows,
  fresh,
  in_order,
  Outgoing,
  Stored,
)
from dllm_jax.pretrained.table import (
  expected,
  flatten,
  Place,
  places_of,
  Region,
  Table,
  unflatten,
)

_THREADS = min(os.cpu_count() or 1, 8)
_CHUNK_BYTES = 2**21  # that a thread reads at once
# Of a transposed copy: what stays in the nearest cache (twice as fast as 64).
_BLOCK_ROWS = 16
_EXTRA_BYTES = 2**20
_scratch = threading.local()


class Source(NamedTuple):
  """What a set of published tensors was like, so that it can be written again.

  Attributes:
    prefix: what the names began with.
    dtypes: the type of each tensor by name.
    extras: tensors that go through as they are, by name: small ones that carry
      nothing, and parts that no parameter holds.
    dtype: the type of all tensors of parameters, whatever they had.
  """

  prefix: str = ""
  dtypes: Mapping[str, np.dtype] | None = None
  extras: Mapping[str, np.ndarray | Stored] | None = None
  dtype: np.dtype | None = None


class Converted(NamedTuple):
  """Parameters in our layout, and what they came from.

  Attributes:
    params: nested dict of numpy arrays (or of what `place` returned).
    used: names of the tensors that were read.
    unused: names of the tensors that carry nothing new.
    source: what the tensors were like.
  """

  params: PyTree
  used: tuple[str, ...]
  unused: tuple[str, ...]
  source: Source


def to_ours(
  table: Table,
  tensors: Mapping[str, Any],
  config: Any,
  *,
  dtype: np.dtype | None = None,
  place: Callable[[Region], Any] | None = None,
) -> Converted:
  """Returns our parameters, filled from published tensors.

  Args:
    table: the family's names.
    tensors: published tensors by name: numpy arrays, or anything with a shape,
      a dtype and rows that are read by slicing.
    config: the network's config.
    dtype: what parameters become; None for what they are.
    place: makes each parameter, by reading the parts that it wants; by default
      it is read whole.

  Raises:
    ValueError: for a tensor that is missing, unknown or of another shape.
  """
  places = places_of(table, config)
  prefix = _prefix(table, tensors)
  used = _check(table, places, tensors, prefix)
  unused = tuple(key for key in tensors if key not in used)
  for key in unused:
    _check_unused(table, key, tensors, prefix, config)
  place = place or Region.whole
  # Reading and copying both leave the interpreter's lock.
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    flat = {
      path: place(_region(one, tensors, prefix, dtype, pool))
      for path, one in places.items()
    }
  small = {
    key: tensors[key]
    for key in unused
    if table.carries(key.removeprefix(prefix))
    or math.prod(tensors[key].shape) * 8 <= _EXTRA_BYTES
  }
  dtypes = {key: np.dtype(tensor.dtype) for key, tensor in tensors.items()}
  return Converted(
    unflatten(flat), tuple(used), unused, Source(prefix, dtypes, small)
  )


def to_theirs(
  table: Table, params: PyTree, config: Any, *, source: Source = Source()
) -> dict[str, Outgoing]:
  """Returns published tensors in the order of their names: `to_ours` inverted.

  Each is made from the parameters when it is asked for.

  Args:
    table: the family's names.
    params: our parameters.
    config: the network's config.
    source: names, types and extras to write again; by default all tensors of
      the table, in the parameters' own types.

  Raises:
    ValueError: if a parameter is absent or has another shape.
  """
  flat, places = flatten(params), places_of(table, config)
  grouped: dict[str, list[tuple[Place, tuple[int, ...]]]] = {}
  for path, one in places.items():
    found = flat[path].shape if path in flat else "absent"
    if found != one.shape:
      raise ValueError(
        f"{table.family}: parameter {path} must be {one.shape}, not {found}"
      )
    for key, index in one.keys():
      grouped.setdefault(key, []).append((one, index))

  tensors, whole = {}, expected(places)
  for key, parts in grouped.items():
    parts.sort(key=lambda part: part[0].start(part[1]))
    full = source.prefix + key
    own = np.dtype(flat[parts[0][0].path].dtype)
    dtype = source.dtype or (source.dtypes or {}).get(full, own)
    tensors[full] = Outgoing(
      dtype,
      whole[key],
      lambda parts=parts, dtype=dtype, shape=whole[key]: _written(
        parts, flat, dtype
      ).reshape(shape),
    )
  _add_copies(table, tensors, config, source)
  return dict(sorted(tensors.items()))  # As the owners' tools write them.


def _add_copies(table, tensors, config, source) -> None:
  """Adds tied, derived and empty tensors, those that the source had."""
  prefix, listed = source.prefix, source.dtypes
  if table.tied and getattr(config, "tied", False):
    copy, original = (prefix + name for name in table.tied)
    if listed is None or copy in listed:
      tensors[copy] = tensors[original]
  for key in listed or ():
    original = table.original(key.removeprefix(prefix))
    if original is not None and key not in tensors:
      tensors[key] = tensors[prefix + original]
  for key, make in table.derived.items():
    if listed is None:
      array = make(config)
      tensors[prefix + key] = _ready(array)
  for key, array in (source.extras or {}).items():
    if key not in tensors:
      tensors[key] = _ready(array)


def _ready(array: np.ndarray | Stored) -> Outgoing:
  return Outgoing(array.dtype, array.shape, lambda: np.asarray(array))


def _prefix(table, tensors) -> str:
  for prefix in table.prefixes:
    if any(key.startswith(prefix) for key in tensors):
      return prefix
  return ""


def _where(tensor) -> str:
  file = getattr(tensor, "file", None)
  return f"{file}: " if file else ""


def _check(table, places, tensors, prefix) -> dict[str, None]:
  """Returns the names that are read, all there and of the right shape."""
  used = {}
  owner = {key: path for path, one in places.items() for key, _ in one.keys()}
  for name, shape in expected(places).items():
    key = prefix + name
    if key not in tensors:
      some = next(iter(tensors.values()), None)
      folder = getattr(some, "file", None)
      raise ValueError(
        (f"{folder.parent}: " if folder else "")
        + f"{table.family}: tensor {key} is missing, which parameter"
        f" {owner[name]} needs; check that the config describes these weights"
      )
    if tuple(tensors[key].shape) != shape:
      raise ValueError(
        f"{_where(tensors[key])}tensor {key} has shape"
        f" {tuple(tensors[key].shape)}, but the config gives {shape}; check"
        " that it describes these weights"
      )
    used[key] = None
  return used


def _check_unused(table, full, tensors, prefix, config):
  """Raises ValueError unless a tensor that was not read carries nothing new."""
  key, tensor = full.removeprefix(prefix), tensors[full]
  original = table.original(key) if config.tied else None
  if original is not None and prefix + original in tensors:
    if not _same(tensor, tensors[prefix + original]):
      raise ValueError(
        f"{_where(tensor)}tensor {key} differs from {original}, but the"
        " config ties them; set tied=False"
      )
    return
  if table.carries(key):
    return
  if key in table.derived:
    right = table.derived[key](config)
    if tuple(tensor.shape) != right.shape or not np.allclose(
      np.asarray(tensor).astype(np.float32), right, rtol=1e-2
    ):
      raise ValueError(
        f"{_where(tensor)}tensor {key} does not follow from the config; check"
        " its sizes and rope_theta"
      )
    return
  if not any(re.fullmatch(pattern, key) for pattern in table.ignored):
    raise ValueError(
      f"{_where(tensor)}tensor {full} has no place in a {table.family}"
      " network of this config; check that the config describes these weights"
    )


def _same(a, b) -> bool:
  if tuple(a.shape) != tuple(b.shape):
    return False
  rows = max(1, _CHUNK_BYTES // max(4 * math.prod(a.shape[1:]), 1))
  return all(
    np.array_equal(a[i : i + rows], b[i : i + rows])
    for i in range(0, a.shape[0], rows)
  )


def _region(one: Place, tensors, prefix, dtype, pool) -> Region:
  if dtype is None:
    types = [np.dtype(tensors[prefix + key].dtype) for key, _ in one.keys()]
    dtype = jnp.result_type(*set(types))
  dtype = np.dtype(dtype)
  stacked = one.name.stacked

  def read(index):
    spans = [s.indices(n)[:2] for s, n in zip(index, one.shape, strict=True)]
    out = fresh([stop - start for start, stop in spans], dtype)

    pieces = list(
      itertools.product(*(range(*span) for span in spans[:stacked]))
    )
    parts = -(-_THREADS // max(len(pieces), 1))

    def fill(piece):
      at, part = piece
      target = tuple(i - span[0] for i, span in zip(at, spans, strict=False))
      tensor = tensors[prefix + one.key(at)]
      if one.name.fused:
        tensor = by_rows(tensor)
      rest = spans[stacked:]
      _copy(one, tensor, one.start(at), out[target], rest, part, parts)

    list(pool.map(fill, itertools.product(pieces, range(parts))))
    return out

  return Region(one.path, one.shape, dtype, read)


def _raw(array: np.ndarray) -> np.ndarray:
  """Returns 16-bit numbers as integers, which are copied faster."""
  return array.view(np.uint16) if array.dtype.itemsize == 2 else array


def _rows(tensor, start: int, stop: int) -> np.ndarray:
  """Returns rows of a published tensor, until this thread asks again.

  Memory that is freed is not at once the system's again, so that a thread reads
  into the same memory each time.
  """
  if not isinstance(tensor, Stored):
    return tensor[start:stop]
  size = (stop - start) * tensor.dtype.itemsize * math.prod(tensor.shape[1:])
  if getattr(_scratch, "memory", np.empty(0)).size < size:
    _scratch.memory = np.empty(max(size, _CHUNK_BYTES), np.uint8)
  return tensor.read(start, stop, _scratch.memory)


def _copy(
  one: Place, tensor, before: int, out: np.ndarray, spans, part: int, parts: int
) -> None:
  """Fills one layer's region from a tensor's rows, which begin after others.

  Of as many parts one, which lies together: where threads took turns, a chunk
  each, loading took a quarter longer. Padding stays zero, as memory came.
  """
  count = one.name.contracts
  columns = [slice(*span) for span in (*spans[count + 1 :], *spans[:count])]
  # Rows of theirs first: [outs, ins].
  view = np.moveaxis(out, range(count), range(out.ndim - count, out.ndim))
  unit = math.prod(one.outs[1:])
  (first, last), rest = spans[count], (*one.outs[1:], *one.kept, *one.ins)
  real = max(min(last, one.rows // unit), first)
  size = unit * math.prod(one.their_rest) * tensor.dtype.itemsize
  step = max(1, _CHUNK_BYTES // max(size, 1))
  back = range(out.ndim - count, out.ndim), range(count)
  share = -(-(real - first) // parts)
  begin, end = first + part * share, min(first + (part + 1) * share, real)
  for a in range(begin, end, step):
    b = min(a + step, end)
    rows = _rows(tensor, before + a * unit, before + b * unit)
    rows = rows.reshape(b - a, *rest)[:, *columns]
    target = np.moveaxis(view[a - first : b - first], *back)
    turned = in_order(np.moveaxis(_raw(rows), *back)).view(tensor.dtype)
    _raw(target)[...] = _raw(turned.astype(out.dtype, copy=False))


def _host(leaf, index: tuple[int, ...]) -> np.ndarray:
  """Returns one layer of a parameter in the host's memory."""
  if isinstance(leaf, jax.Array):
    if not leaf.is_fully_addressable:
      from jax.experimental import multihost_utils  # noqa: PLC0415

      leaf = multihost_utils.process_allgather(leaf[index], tiled=True)
      return np.asarray(leaf)
    if len(leaf.sharding.device_set) == 1 and _on_host(leaf):
      return np.asarray(leaf)[index]
  return np.asarray(leaf[index])


def _on_host(leaf) -> bool:
  return next(iter(leaf.sharding.device_set)).platform == "cpu"


def _written(parts, flat, dtype) -> np.ndarray:
  """Returns the published tensor that holds these parameters of one layer."""
  rows = sum(one.rows for one, _ in parts)
  out = np.empty((rows, *parts[0][0].their_rest), dtype)
  for one, index in parts:
    array = _host(flat[one.path], index)
    target = out[one.start(index) :][: one.rows]
    if one.name.contracts:
      array = array.reshape(math.prod(one.ins), -1).T
    else:
      array = array.reshape(-1, *one.kept)
    array = array[: one.rows]
    # Blocks of columns of theirs are rows of ours, which lie together.
    width = array.shape[1] if array.ndim > 1 else 1
    block = _BLOCK_ROWS if one.name.contracts else max(width, 1)
    for a in range(0, width, block):
      here = np.s_[:, a : a + block] if array.ndim > 1 else np.s_[:]
      if array.dtype == dtype:
        _raw(target)[here] = _raw(array)[here]
      else:
        target[here] = array[here].astype(dtype)
  return out

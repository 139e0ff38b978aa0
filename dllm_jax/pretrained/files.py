"""Published folders: safetensors read by rows and written as a stream.

A safetensors file is eight bytes of length, a JSON header and raw bytes. Its
tensors are read a few rows at a time, so that nothing is ever held whole here,
and written one after another. Only JSON and raw numbers are read: nothing on
disk is ever run, and pickles are refused.
"""

import collections
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
import dataclasses
import functools
import json
import math
import mmap
import os
import re
import struct
from typing import Any
import warnings

import jax
import ml_dtypes
import numpy as np
import safetensors

from dllm_jax.core import paths
from dllm_jax.core.paths import Path

_DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER = 100_000_000  # bytes, of safetensors itself
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor on disk; indexing by a slice of rows reads those rows.

  Attributes:
    file: where it is.
    dtype: the type of its numbers.
    shape: its shape.
    offset: bytes before it in the file.
  """

  file: Path
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  def __getitem__(self, rows: slice) -> np.ndarray:
    """Returns rows of the tensor (of its first axis)."""
    start, stop, _ = rows.indices(self.shape[0])
    size = math.prod(self.shape[1:]) * self.dtype.itemsize
    return self.read(start, stop, np.empty((stop - start) * size, np.uint8))

  def read(self, start: int, stop: int, memory: np.ndarray) -> np.ndarray:
    """Returns rows of the tensor, in memory that was made for them.

    Args:
      start: the first row.
      stop: the row after the last.
      memory: bytes, at least as many as the rows have.

    Raises:
      ValueError: the file has become shorter.
    """
    size = math.prod(self.shape[1:]) * self.dtype.itemsize
    memory = memory[: (stop - start) * size]
    self._fill(memory, start * size)
    return memory.view(self.dtype).reshape(stop - start, *self.shape[1:])

  def _fill(self, memory: np.ndarray, begin: int) -> None:
    """Reads the bytes of the tensor from `begin` on."""
    done = 0
    with self.file.open("rb") as file:
      file.seek(self.offset + begin)
      while done < memory.size:
        count = file.readinto(memory[done:])
        if not count:
          raise ValueError(f"{self.file} is truncated; fetch it again")
        done += count

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    """Returns the whole tensor."""
    numbers = np.empty(self.shape, self.dtype)
    self._fill(numbers.reshape(-1).view(np.uint8), 0)
    return numbers.astype(dtype or self.dtype, copy=False)


def fresh(shape, dtype: np.dtype) -> np.ndarray:
  """Returns zeros in memory that a CPU device takes over without a copy.

  Whole pages, not numpy's, who asks for huge ones: where memory is in pieces,
  those are put together first, which took longer than reading and copying do. Nor
  all pages at once: one core would clear them, where all that write can.
  """
  size = math.prod(shape) * dtype.itemsize
  flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
  memory = mmap.mmap(-1, max(size, 1), flags=flags)
  return np.frombuffer(memory, np.uint8, size).view(dtype).reshape(shape)


def in_order(view: np.ndarray) -> np.ndarray:
  """Returns a transposed view's numbers in their order.

  JAX's own copy to a CPU goes by tiles, at 3 times the rate of numpy's.
  """
  cpu = None if view.flags.c_contiguous else _cpu()
  return view if cpu is None else np.asarray(jax.device_put(view, cpu))


@functools.cache
def _cpu() -> jax.Device | None:
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # JAX_PLATFORMS names others only.
    return None


def by_rows(tensor):
  """Returns a tensor of all experts with the rows of each after the others'."""
  rows = math.prod(tensor.shape[:2]), *tensor.shape[2:]
  if isinstance(tensor, Stored):
    return dataclasses.replace(tensor, shape=rows)
  return np.asarray(tensor).reshape(rows)


def read_config(folder: str | os.PathLike) -> dict[str, Any]:
  """Returns the `config.json` of a published folder.

  Raises:
    FileNotFoundError: there is no folder, or no such file in it.
    ValueError: the path is a file, or the file is no JSON object.
  """
  folder = paths.place(folder)
  if folder.is_file():
    raise ValueError(
      f"{folder} is a file; give the folder that holds config.json and"
      f" {SINGLE}" + _pickle_hint(folder)
    )
  if not folder.is_dir():
    raise FileNotFoundError(f"{folder} does not exist; give a folder")
  path = folder / "config.json"
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} is missing; a published folder holds config.json and {SINGLE}"
    )
  return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
  """Returns the JSON object in a file.

  Raises:
    ValueError: there is something else in it.
  """
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except (ValueError, UnicodeDecodeError) as error:
    raise ValueError(f"{path} is not JSON ({error}); fetch it again") from error
  if not isinstance(value, dict):
    raise ValueError(f"{path} must hold a JSON object; fetch it again")
  return value


def _pickle_hint(path: Path) -> str:
  if path.suffix not in _PICKLES:
    return ""
  return "; a pickle is never read: have the weights saved as safetensors"


def read_tensors(folder: str | os.PathLike) -> dict[str, Stored]:
  """Returns the tensors of a published folder by name; none is read yet.

  Raises:
    FileNotFoundError: there are no weights, or a shard is missing.
    ValueError: there are pickles only, a file is damaged, or an index stands
      beside a whole file: only one of them can be the model.
  """
  folder = paths.place(folder)
  index = folder / INDEX
  if index.is_file():
    return _read_shards(folder, index)
  files = sorted(folder.glob("*.safetensors"))
  if (folder / SINGLE).is_file():
    shards = [file.name for file in files if _SHARD.fullmatch(file.name)]
    if shards:
      warnings.warn(
        f"{folder} holds {SINGLE}, which is read, and {shards[0]} without an"
        f" {INDEX}: remove the shards, or fetch the index and remove {SINGLE}",
        stacklevel=3,
      )
    files = [folder / SINGLE]
  if len(files) == 1:
    return read_file(files[0])
  if files:
    raise FileNotFoundError(
      f"{index} is missing, which says what is in {len(files)} shards"
    )
  pickles = [p for p in sorted(folder.iterdir()) if p.suffix in _PICKLES]
  if pickles:
    raise ValueError(f"{pickles[0]} is refused{_pickle_hint(pickles[0])}")
  raise FileNotFoundError(f"{folder / SINGLE} is missing, and so is {INDEX}")


def _read_shards(folder: Path, index: Path):
  names = read_json(index).get("weight_map")
  if not isinstance(names, dict) or not names:
    raise ValueError(f"{index} has no weight_map; fetch it again")
  if (folder / SINGLE).is_file() and SINGLE not in names.values():
    raise ValueError(
      f"{folder} holds {SINGLE} and, in {INDEX}, other files with weights: one"
      " of them is left over; remove it (the index with its shards, or the"
      " single file)"
    )
  shards: dict[str, dict[str, Stored]] = {}
  tensors = {}
  for key, name in names.items():
    if not isinstance(name, str) or Path(name).name != name:
      raise ValueError(f"{index}: tensor {key} is in no file of the folder")
    path = folder / name
    if name not in shards:
      if path.suffix in _PICKLES:
        raise ValueError(f"{path} is refused{_pickle_hint(path)}")
      if not path.is_file():
        raise FileNotFoundError(
          f"{path} is missing, which holds tensor {key}; fetch the shard"
        )
      shards[name] = read_file(path)
    if key not in shards[name]:
      raise ValueError(f"{path} lacks tensor {key}, which {INDEX} says it has")
    tensors[key] = shards[name][key]
  listed = set(names)
  for name, found in shards.items():
    extra = sorted(set(found) - listed)
    if extra:
      raise ValueError(f"{folder / name}: {INDEX} does not list {extra[0]}")
  return tensors


def read_file(path: Path) -> dict[str, Stored]:
  """Returns the tensors of one safetensors file by name.

  Raises:
    ValueError: the file is truncated or something else.
  """
  try:
    if not paths.in_bucket(path):
      with safetensors.safe_open(path, "numpy"):
        pass  # Opening checks the header, and that the file is whole.
    length, header = _header(path)
  except (safetensors.SafetensorError, struct.error, ValueError) as error:
    raise ValueError(
      f"{path} is not a safetensors file, or is truncated ({error}); fetch it"
      " again"
    ) from error
  tensors = {}
  for key, value in header.items():
    name, offset = value["dtype"], 8 + length + value["data_offsets"][0]
    if name not in _DTYPES:
      raise ValueError(
        f"{path}: tensor {key} is of type {name}; legal: {', '.join(_DTYPES)}"
      )
    tensors[key] = Stored(path, _DTYPES[name], tuple(value["shape"]), offset)
  return tensors


def _header(path: Path) -> tuple[int, dict[str, Any]]:
  """Returns the length of a header and what it says of each tensor."""
  with path.open("rb") as file:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > _MAX_HEADER:
      raise ValueError(f"a header of {length} bytes")
    header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    ends = [value["data_offsets"][1] for value in header.values()]
    size, found = 8 + length + max(ends, default=0), file.seek(0, os.SEEK_END)
  if found != size:
    raise ValueError(f"{found} bytes, not {size}")
  return length, header


@dataclasses.dataclass(frozen=True)
class Outgoing:
  """A tensor to be written.

  Attributes:
    dtype: the type of its numbers.
    shape: its shape.
    make: makes it, when its turn comes.
  """

  dtype: np.dtype
  shape: tuple[int, ...]
  make: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    """Its size in bytes."""
    return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
  folder: Path,
  tensors: Mapping[str, Outgoing],
  *,
  shard_bytes: int,
  progress: Callable[[int], None] = lambda n: None,
) -> None:
  """Writes tensors as one safetensors file, or as shards with an index.

  Args:
    folder: where.
    tensors: by name; each is made when it is written.
    shard_bytes: the most bytes of tensors in a file, unless one has more.
    progress: called with the bytes that were written.
  """
  shards: list[dict[str, Outgoing]] = [{}]
  filled = 0
  for key, tensor in tensors.items():
    if shards[-1] and filled + tensor.nbytes > shard_bytes:
      shards.append({})
      filled = 0
    shards[-1][key] = tensor
    filled += tensor.nbytes
  if len(shards) == 1:
    _write_file(folder / SINGLE, shards[0], progress)
    return
  where = {}
  for i, shard in enumerate(shards):
    name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    _write_file(folder / name, shard, progress)
    where.update(dict.fromkeys(shard, name))
  total = sum(tensor.nbytes for tensor in tensors.values())
  index = {"metadata": {"total_size": total}, "weight_map": where}
  write_json(folder / INDEX, index)


def _write_file(path, tensors, progress) -> None:
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  offset = 0
  for key, tensor in tensors.items():
    header[key] = {
      "dtype": _NAMES[tensor.dtype],
      "shape": list(tensor.shape),
      "data_offsets": [offset, offset + tensor.nbytes],
    }
    offset += tensor.nbytes
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    for (key, tensor), array in zip(
      tensors.items(), _made(list(tensors.values())), strict=True
    ):
      array = np.ascontiguousarray(array)
      if array.dtype != tensor.dtype or array.shape != tensor.shape:
        raise ValueError(
          f"tensor {key} came out as {array.dtype} {array.shape}, not"
          f" {tensor.dtype} {tensor.shape}"
        )
      file.write(array.reshape(-1).view(np.uint8).data)
      progress(tensor.nbytes)


def _made(tensors: list[Outgoing]) -> Iterable[np.ndarray]:
  """Yields tensors in order, the next few being made meanwhile."""
  ahead = min(os.cpu_count() or 1, 8)
  with futures.ThreadPoolExecutor(ahead) as pool:
    waiting: collections.deque = collections.deque()
    for tensor in tensors:
      waiting.append(pool.submit(tensor.make))
      if len(waiting) > ahead:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
  """Writes a JSON object."""
  path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

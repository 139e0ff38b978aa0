"""Tokens as others prepared them, by memory map: nothing is read or copied early.

    Megatron      x.bin ids, x.idx their type and where documents end
    modded form   x.bin 1024 bytes of header (20240520, version, count), ids
    nanoGPT       x.bin ids, uint16
    numpy         x.npy an array of integers

Which it is, content says. No file names its tokenizer: the caller does.
"""

import bisect
from collections.abc import Sequence
import dataclasses

import numpy as np

from dllm_jax.core import paths
from dllm_jax.data import packing as packing_lib
from dllm_jax.data.tokenizer import Tokenizer

_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_HEAD = 34  # Magic, version, type, two counts.
_INDEX_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_HEADER_BYTES = 1024
# llm.c's headers, of GPT-2's ids and of larger vocabularies'.
_HEADER_TYPES = {20240520: "<u2", 20240801: "<u4"}
# Text that stands for held-out tokens is measured on so many of them.
_MEASURED_TOKENS = 2**18


@dataclasses.dataclass(frozen=True)
class File:
  """Ids of one file.

  Attributes:
    path: the file.
    ids: all of them, mapped.
    starts: where documents begin, mapped; None: an end or a beginning of text
      among the ids says it.
    begins: whether that token begins a document rather than ending it.
  """

  path: str
  ids: np.ndarray
  starts: np.ndarray | None = None
  begins: bool = False


def opened(path: str) -> File:
  """Maps a file of ids.

  Raises:
    ValueError: it lies in a bucket, holds no ids, or does not fit its index.
  """
  if paths.in_bucket(path):
    raise ValueError(
      f"{path}: token files are read by memory map, which buckets have not; "
      "copy it to a local disk"
    )
  index = path.removesuffix(".bin") + ".idx"
  if path.endswith(".npy"):
    return _numpy(path)
  if paths.place(index).exists():
    return _megatron(path, index)
  header = np.fromfile(path, "<i4", 3)
  kind = _HEADER_TYPES.get(int(header[0])) if len(header) == 3 else None
  if kind is None:
    return File(path, _mapped(path, "<u2"))
  ids = _mapped(path, kind, _HEADER_BYTES)
  if len(ids) != header[2]:
    raise ValueError(
      f"{path} has {len(ids)} ids where its header counts {header[2]}; get it "
      "again"
    )
  return File(path, ids, begins=True)


def _mapped(path: str, kind: str, offset: int = 0) -> np.ndarray:
  size = paths.place(path).stat().length - offset
  if size <= 0 or size % np.dtype(kind).itemsize:
    raise ValueError(
      f"{path} holds {max(size, 0)} bytes, which are no ids of type "
      f"{np.dtype(kind).name}; without a header or an .idx beside it, a .bin "
      "is uint16"
    )
  return np.memmap(path, kind, "r", offset)


def _numpy(path: str) -> File:
  try:
    ids = np.load(path, mmap_mode="r", allow_pickle=False)
  except (ValueError, EOFError) as error:
    raise ValueError(f"{path} is not a .npy file ({error})") from error
  if ids.dtype.kind not in "iu" or not ids.size or not ids.flags.c_contiguous:
    raise ValueError(
      f"{path} holds {ids.dtype.name} {ids.shape}; token ids are integers, at "
      "least one, in the order of C"
    )
  return File(path, ids.reshape(-1))


def _megatron(path: str, index: str) -> File:
  wrong = ValueError(
    f"{index} does not fit {path}, or is no index of Megatron's; get both again"
  )
  head = np.fromfile(index, np.uint8, _INDEX_HEAD).tobytes()
  kind = _INDEX_TYPES.get(head[17]) if len(head) == _INDEX_HEAD else None
  if kind is None or not head.startswith(_INDEX_MAGIC):
    raise wrong
  sequences, documents = np.frombuffer(head, "<u8", 2, 18).tolist()
  size = paths.place(index).stat().length
  if not sequences or size < _INDEX_HEAD + 12 * sequences + 8 * documents:
    raise wrong
  whole = np.memmap(index, np.uint8, "r")
  at = _INDEX_HEAD
  sizes = np.frombuffer(whole, "<i4", sequences, at)
  pointers = np.frombuffer(whole, "<i8", sequences, at := at + 4 * sequences)
  ends = np.frombuffer(whole, "<i8", documents, at + 8 * sequences)
  ids, width = _mapped(path, kind), np.dtype(kind).itemsize
  if pointers[-1] + width * int(sizes[-1]) != width * len(ids) or (
    documents and ends[-1] > sequences
  ):
    raise wrong
  return File(path, ids, starts=_Starts(pointers, ends, width))


class _Starts:
  """Where documents begin, as an ascending array that is never built."""

  def __init__(self, pointers: np.ndarray, ends: np.ndarray, width: int):
    self._pointers, self._ends, self._width = pointers, ends, width

  def __len__(self) -> int:
    return max(len(self._ends) - 1, 0)

  def __getitem__(self, i: int) -> int:
    at = self._ends[i]
    if at == len(self._pointers):  # Empty documents at the end.
      return 2**62
    return int(self._pointers[at]) // self._width

  def between(self, first: int, last: int) -> np.ndarray:
    """Returns those above `first` and below `last`."""
    low = bisect.bisect_right(self, first)
    high = bisect.bisect_left(self, last)
    return np.asarray([self[i] for i in range(low, high)], np.int64)


class TokenRows:
  """Rows of mapped files, by index; the last of each file is padded.

  Args:
    files: the files, and which of their ids.
    length: tokens a row.
    packing: "packed" keeps documents apart, "slices" does not.
    tokenizer: whose ids they are.
  """

  def __init__(
    self,
    files: Sequence[tuple[File, range]],
    *,
    length: int,
    packing: packing_lib.Packing,
    tokenizer: Tokenizer,
  ):
    self._files = [(f, r) for f, r in files if len(r)]
    self._length, self._packing = length, packing
    self._tokenizer = tokenizer
    self._last = np.cumsum([-(-len(r) // length) for _, r in self._files])

  def __len__(self) -> int:
    return int(self._last[-1]) if len(self._last) else 0

  def __getitem__(self, index: int) -> packing_lib.Row:
    at = int(np.searchsorted(self._last, index, side="right"))
    file, inside = self._files[at]
    row = index - (int(self._last[at - 1]) if at else 0)
    start = inside.start + row * self._length
    stop = min(start + self._length, inside.stop)
    ids = file.ids[start:stop].astype(np.int32)
    _check(file, ids, start, self._tokenizer)
    if self._packing == "slices":
      segments = np.ones(len(ids), np.int32)
    else:
      segments = self._segments(file, ids, start)
    return packing_lib.pad(ids, segments, self._length)

  def _segments(self, file: File, ids: np.ndarray, start: int) -> np.ndarray:
    """Returns segment ids: a new one where a document begins."""
    if file.starts is not None:
      begins = np.zeros(len(ids), np.int32)
      begins[file.starts.between(start, start + len(ids)) - start] = 1
    else:
      begins = (ids == self._tokenizer.eos_id).astype(np.int32)
      if not file.begins:
        begins[1:], begins[0] = begins[:-1].copy(), 0
      begins[0] = 0
    return 1 + np.cumsum(begins, dtype=np.int32)


def sides(
  files: Sequence[File], held_out: float
) -> tuple[list[tuple[File, range]], list[tuple[File, range]]]:
  """Returns the ids for training and the last ones of each file, held out.

  Where documents are known, a document lies on one side.
  """
  train, tail = [], []
  for file in files:
    cut = len(file.ids) - int(len(file.ids) * held_out)
    if file.starts is not None and cut < len(file.ids):
      later = file.starts.between(cut - 1, len(file.ids))
      cut = int(later[0]) if len(later) else len(file.ids)
    train.append((file, range(cut)))
    tail.append((file, range(cut, len(file.ids))))
  return train, tail


def measured(
  files: Sequence[tuple[File, range]], tokenizer: Tokenizer
) -> packing_lib.TextSize:
  """Returns the size of the text that the first ids stand for."""
  size = packing_lib.TextSize()
  for file, inside in files:
    some = inside[: _MEASURED_TOKENS - size.tokens]
    ids = file.ids[some.start : some.stop].astype(np.int32)
    if not len(ids):
      break
    _check(file, ids, some.start, tokenizer)
    size += packing_lib.text_size(tokenizer.decode(ids), ids)
  return size


def _check(
  file: File, ids: np.ndarray, start: int, tokenizer: Tokenizer
) -> None:
  """Raises if ids from a place of a file on are not the tokenizer's."""
  legal = (ids >= 0) & (ids < tokenizer.vocab_size)
  if not legal.all():
    at = int(np.argmin(legal))
    raise ValueError(
      f"{file.path}: token {start + at} is {ids[at]}, beyond the "
      f"{tokenizer.vocab_size} ids of the tokenizer; name the tokenizer that "
      "made the file"
    )

"""Text packed on the fly, in a fixed number of virtual shards.

The corpus is cut into pieces, the pieces are dealt to virtual shards, and each
shard reads, shuffles and packs its own, endlessly. A file is opened when its
turn comes and a window of it held, so that the first batch and the memory do not
depend on how large files are; a shard that goes on in the middle of a packed
file reads it from its beginning. Row r of every batch comes
from one shard, and each shard is read by the process that holds its rows: so no
process reads everything, a batch does not depend on how many processes there
are, and the states of all shards together fit any number of them.

    pieces -> shard 0: shuffle -> tokenise -> pack -> rows 0, 1   of batch k
           -> shard 1: shuffle -> tokenise -> pack -> rows 2, 3   of batch k
"""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import math
from typing import Any, Literal

import grain
import numpy as np

from dllm_jax.data import packing as packing_lib
from dllm_jax.data import source
from dllm_jax.data.tokenizer import Tokenizer

_MIN_PIECE_BYTES = 2**16
_MAX_PIECE_BYTES = 2**22
# A window of documents is held in memory, one a shard, and shuffled there: so
# many characters of its own, and as many more that other shards keep.
_WINDOW_CHARACTERS = 2**20
_READ_CHARACTERS = 2**23
# Text is measured on its beginning only, and looked for in so much.
_MEASURED_CHARACTERS = 2**20
_LOOKED_CHARACTERS = 2**27


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
  """One side of a corpus, packed on the fly.

  Attributes:
    path: what the user called it, for messages.
    files: the files.
    form: how documents lie in them.
    tokenizer: how text becomes tokens.
    length: tokens a row.
    packing: whether documents are kept apart.
    held_out: the fraction held out.
    virtual_shards: see `shards`.
    side: which part of each document is read.
  """

  path: str
  files: tuple[str, ...]
  form: source.Format
  tokenizer: Tokenizer
  length: int
  packing: packing_lib.Packing
  held_out: float
  virtual_shards: int
  side: Literal["train", "held_out"] = "train"

  def shards(self, batch_size: int) -> int:
    """Returns the number of virtual shards, which divides the batch size."""
    return math.gcd(self.virtual_shards, batch_size)

  def dealt(
    self, shards: int, own: range, seed: int
  ) -> dict[int, grain.IterDataset]:
    """Returns the endless rows of some of so many shards."""
    units = _units(self.files, self.form, shards)
    return {
      shard: self._packed(units[shard::shards], seed=(seed, shard))
      for shard in own
    }

  def rows(self) -> Iterator[packing_lib.Row]:
    """Yields all rows once, in the order of the files."""
    return iter(self._packed(_units(self.files, self.form, 1), seed=None))

  def measured(self) -> packing_lib.TextSize:
    """Returns the size of the beginning of this side's text."""
    size, read = packing_lib.TextSize(), 0
    side = 0 if self.side == "train" else 1
    for document in source.documents(self.files, self.form):
      read += len(document.text)
      text = source.split(document, self.held_out)[side]
      if text.strip():
        ids = packing_lib.tokenise(text, document.path, self.tokenizer)
        size += packing_lib.text_size(text, ids)
      if size.characters >= _MEASURED_CHARACTERS or read >= _LOOKED_CHARACTERS:
        break
    return size

  def _packed(self, units, seed) -> grain.IterDataset:
    return grain.experimental.ConcatThenSplitIterDataset(
      _Documents(self, units, seed), length_struct={"tokens": self.length}
    ).map(self._row)

  def _row(self, element: dict[str, np.ndarray]) -> packing_lib.Row:
    segments = element["tokens_segment_ids"]
    if self.packing == "slices":
      segments = np.minimum(segments, 1)
    return packing_lib.Row(element["tokens"], segments)


@dataclasses.dataclass(frozen=True)
class _Unit:
  """Every `parts`-th document of a piece, from `part` on."""

  span: source.Span
  part: int
  parts: int


def _units(
  files: Sequence[str], form: source.Format, shards: int
) -> list[_Unit]:
  """Returns the pieces to deal, at least one a shard.

  Files that cannot be entered midway are read by several shards, each of which
  keeps documents of its own, where there are too few of them.
  """
  target = source.size(files) // (4 * shards)
  span_bytes = min(max(target, _MIN_PIECE_BYTES), _MAX_PIECE_BYTES)
  spans = source.spans(files, form, span_bytes)
  if not spans:
    raise source.empty(files[0])
  parts = -(-shards // len(spans))
  return [_Unit(s, part, parts) for part in range(parts) for s in spans]


class _Documents(grain.IterDataset):
  """The tokenised documents of some units; endless if there is a seed."""

  def __init__(
    self,
    stream: Stream,
    units: Sequence[_Unit],
    seed: tuple[int, int] | None,
  ):
    super().__init__()
    self.stream, self.units, self.seed = stream, units, seed

  def __iter__(self) -> grain.DatasetIterator:
    return _DocumentIterator(self)


class _DocumentIterator(grain.DatasetIterator):
  """Reads one unit after another; its state says where, not what."""

  def __init__(self, documents: _Documents):
    super().__init__()
    self._dataset = documents
    self.set_state({"epoch": 0, "unit": 0, "window": 0, "document": 0})

  def get_state(self) -> dict[str, int]:
    return {
      "epoch": self._epoch,
      "unit": self._unit,
      "window": self._window,
      "document": self._document,
    }

  def set_state(self, state: dict[str, int]) -> None:
    self._epoch = state["epoch"]
    self._unit = state["unit"]
    self._window = state["window"]  # Documents of the unit before it.
    self._document = state["document"]
    self._texts: list[tuple[str, str]] | None = None
    self._reader: Iterator[source.Document] | None = None
    self._barren = 0  # Units without a document, in a row.

  def __next__(self) -> dict[str, np.ndarray]:
    while True:
      if self._texts is None:
        if self._unit == len(self._dataset.units):
          self._end_epoch()
        self._texts, self._read, self._more = self._next_window()
      if self._document < len(self._texts):
        self._barren = -1
        text, path = self._texts[self._document]
        self._document += 1
        tokenizer = self._dataset.stream.tokenizer
        ids = packing_lib.tokenise(text, path, tokenizer)
        if len(ids):
          return {"tokens": ids}
      else:
        self._texts, self._document = None, 0
        self._window += self._read
        if not self._more:
          self._barren += 1
          self._unit, self._window, self._reader = self._unit + 1, 0, None

  def _end_epoch(self) -> None:
    stream = self._dataset.stream
    if self._dataset.seed is None:
      raise StopIteration
    if self._barren >= len(self._dataset.units):
      raise ValueError(
        f"{stream.path} has too few documents for virtual shard "
        f"{self._dataset.seed[1]}; lower virtual_shards, or raise "
        "in_memory_bytes or run dllm prepare, which need no shards"
      )
    self._epoch, self._unit = self._epoch + 1, 0

  def _next_window(self) -> tuple[list[tuple[str, str]], int, bool]:
    """Returns (text, file) of a window, its documents, and if more follow."""
    dataset, stream = self._dataset, self._dataset.stream
    unit = dataset.units[self._order(len(dataset.units))[self._unit]]
    if self._reader is None:
      self._reader = itertools.islice(
        source.read(unit.span, stream.form), self._window, None
      )
    side = 0 if stream.side == "train" else 1
    texts, read, characters, own = [], 0, 0, 0
    for document in self._reader:
      if (self._window + read) % unit.parts == unit.part:
        own += len(document.text)
        text = source.split(document, stream.held_out)[side]
        if text.strip():
          texts.append((text, document.path))
      read += 1
      characters += len(document.text)
      if own >= _WINDOW_CHARACTERS or characters >= _READ_CHARACTERS:
        break
    else:
      self._reader = iter(())
    order = self._order(len(texts), self._unit + 1, self._window)
    more = own >= _WINDOW_CHARACTERS or characters >= _READ_CHARACTERS
    return [texts[i] for i in order], read, more

  def _order(self, n: int, *salt: int) -> np.ndarray:
    """Returns a permutation, a function of seed, shard, epoch and salt."""
    if self._dataset.seed is None:
      return np.arange(n)
    key = (*self._dataset.seed, self._epoch, *(salt or (0,)))
    return np.random.default_rng(key).permutation(n)


def interleaved(
  side: Any,
  *,
  batch_size: int,
  seed: int,
  process_index: int,
  process_count: int,
) -> grain.IterDataset:
  """Returns this process's rows of each batch, endlessly.

  Elements are `Row`s of arrays `[batch_size / process_count, length]`.

  Args:
    side: a `Stream`, or a `Mixture` of sides.
    batch_size: rows of the whole batch.
    seed: with the batch's number it determines the batch.
    process_index: this process.
    process_count: how many there are.

  Raises:
    ValueError: the number of processes does not divide that of shards.
  """
  shards = side.shards(batch_size)
  if shards % process_count:
    raise ValueError(
      f"{process_count} processes cannot share {shards} virtual shards "
      f"(virtual_shards {side.virtual_shards}, batch_size {batch_size}); "
      "make both a multiple of the processes"
    )
  own = shards // process_count
  here = range(process_index * own, (process_index + 1) * own)
  return _Interleaved(side.dealt(shards, here, seed), rows=batch_size // shards)


class _Interleaved(grain.IterDataset):
  """The same number of rows of each shard, in the order of shards."""

  def __init__(self, datasets: dict[int, grain.IterDataset], *, rows: int):
    super().__init__()
    self.datasets, self.rows = datasets, rows

  def __iter__(self) -> grain.DatasetIterator:
    return _InterleavedIterator(self)


class _InterleavedIterator(grain.DatasetIterator):
  def __init__(self, dataset: _Interleaved):
    super().__init__()
    self._rows = dataset.rows
    self._shards = {s: iter(d) for s, d in dataset.datasets.items()}
    self._batch = 0

  def __next__(self) -> packing_lib.Row:
    rows = [
      next(shard) for shard in self._shards.values() for _ in range(self._rows)
    ]
    self._batch += 1
    return packing_lib.stack(rows)

  def get_state(self) -> dict[str, Any]:
    return {
      "batch": self._batch,
      "shards": {str(s): i.get_state() for s, i in self._shards.items()},
    }

  def set_state(self, state: dict[str, Any]) -> None:
    missing = [s for s in self._shards if str(s) not in state["shards"]]
    if missing:
      raise ValueError(
        f"the saved data state has no virtual shard {missing[0]}; merge the "
        "states of all processes and restore with the same batch_size and "
        "virtual_shards"
      )
    self._batch = state["batch"]
    for shard, iterator in self._shards.items():
      iterator.set_state(restored(state["shards"][str(shard)]))


def restored(state: dict[str, Any]) -> dict[str, Any]:
  """Returns a packer's state as it was before JSON made lists of its tuples."""
  if "remainder_slices" not in state:
    return state
  slices = state["remainder_slices"].items()
  return state | {"remainder_slices": {k: tuple(v) for k, v in slices}}

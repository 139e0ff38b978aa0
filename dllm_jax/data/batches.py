"""Batches of rows: those of held-out text, in order, and blank ones.

The order of training is in `order`, which reads ahead with Grain; nothing here
needs it, nor text.
"""

from collections.abc import Iterator
import dataclasses
import itertools

import numpy as np

from dllm_jax import data
from dllm_jax.core.types import Batch
from dllm_jax.data import packing, streams


def batch_of(rows: packing.Row, texts_apart: bool = False) -> Batch:
  """Returns the batch of rows that are stacked."""
  return Batch(
    tokens=rows.tokens.astype(np.int32),
    loss_mask=rows.mask,
    segment_ids=rows.segments.astype(np.int32),
    positions=packing.positions(rows.segments),
    texts_apart=texts_apart,
  )


def blank(rows: int, length: int) -> Batch:
  """Returns a batch of zeros that all count."""
  zeros = np.zeros((rows, length), np.int32)
  return batch_of(packing.Row(zeros, np.ones_like(zeros)))


def held_out_batches(
  corpus: "data.Corpus",
  *,
  batch_size: int,
  limit: int | None = None,
  process_index: int = 0,
  process_count: int = 1,
) -> "HeldOutBatches":
  """Returns the batches of the held-out text, which can be gone through again.

  The order is fixed. The last batch is filled with rows that no loss counts, so
  that every token counts once.

  Args:
    corpus: what to evaluate on.
    batch_size: rows of the whole batch, over all processes.
    limit: at most so many batches; None for all.
    process_index: this process among those that hold different rows.
    process_count: the number of those.

  Raises:
    ValueError: the processes do not divide the batch.
  """
  rows = share(batch_size, process_index, process_count)
  return HeldOutBatches(
    corpus=corpus, batch_size=batch_size, rows=rows, limit=limit
  )


def share(batch_size: int, process_index: int, process_count: int) -> range:
  """Returns the rows of a process."""
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f"batch_size {batch_size} is not a multiple of {process_count} "
      "processes; choose one that is"
    )
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index is {process_index}; legal are 0 to {process_count - 1}"
    )
  share = batch_size // process_count
  return range(process_index * share, (process_index + 1) * share)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutBatches:
  """The held-out batches; iterate as often as needed.

  Attributes:
    corpus: the text.
    batch_size: rows of the whole batch.
    rows: the rows of this process.
    limit: at most so many batches, or None.
  """

  corpus: "data.Corpus"
  batch_size: int
  rows: range
  limit: int | None

  def __iter__(self) -> Iterator[Batch]:
    return itertools.islice(self._batches(), self.limit)

  def _batches(self) -> Iterator[Batch]:
    held_out = self.corpus.held_out
    if held_out is None:
      return
    if isinstance(held_out, streams.Stream | streams.Mixture):
      rows = held_out.rows()
      while chunk := list(itertools.islice(rows, self.batch_size)):
        yield self._filled([chunk[r] for r in self.rows if r < len(chunk)])
      return
    for start in range(0, len(held_out), self.batch_size):
      here = range(start + self.rows.start, start + self.rows.stop)
      yield self._filled([held_out[i] for i in here if i < len(held_out)])

  def _filled(self, rows: list[packing.Row]) -> Batch:
    zeros = np.zeros((self.corpus.length,), np.int32)
    rows += [packing.Row(zeros, zeros)] * (len(self.rows) - len(rows))
    return batch_of(packing.stack(rows), self.corpus.texts_apart)

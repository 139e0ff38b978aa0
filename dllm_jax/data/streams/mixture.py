"""Several corpora as one: which row of a run is whose.

Row n of a run is of the part into whose share of [0, 1) the fraction of n phi
falls, phi the golden ratio and the shares as wide as the weights. So each batch
has nearly the weights' numbers of rows, and whose a row is depends on nothing
but n. Parts are tokenised, shuffled and packed apart: a row is of one of them.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import math
from typing import Any

import grain
import numpy as np

from dllm_jax.data import packing as packing_lib
from dllm_jax.data.streams import stream

_PHI = 0x9E3779B97F4A7C15  # The fraction of the golden ratio, in 64 bits.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
  """One side of several corpora.

  Attributes:
    parts: their sides: streams, or rows of random access.
    weights: their shares of the rows, in any unit.
    virtual_shards: see `stream.Stream`.
  """

  parts: tuple[Any, ...]
  weights: tuple[float, ...]
  virtual_shards: int

  def shards(self, batch_size: int) -> int:
    """Returns the number of virtual shards, which divides the batch size."""
    return math.gcd(self.virtual_shards, batch_size)

  def dealt(
    self, shards: int, own: range, seed: int
  ) -> dict[int, grain.IterDataset]:
    """Returns the endless rows of some of so many shards."""
    parts = [
      part.dealt(shards, own, seed)
      if isinstance(part, stream.Stream)
      else {s: _shard(part, s, shards, seed) for s in own}
      for part in self.parts
    ]
    return {
      shard: _Mixed(self, [part[shard] for part in parts], shard, shards, seed)
      for shard in own
    }

  def rows(self) -> Iterator[packing_lib.Row]:
    """Yields all rows once, in the order of training as long as all parts last."""
    left = {i: _once(part) for i, part in enumerate(self.parts)}
    row = 0
    while left:
      part = self.part(row, 0)
      row += 1
      if part in left:
        try:
          yield next(left[part])
        except StopIteration:
          del left[part]

  def part(self, row: int, seed: int) -> int:
    """Returns whose row `row` of a run is."""
    place = ((row + seed) * _PHI % 2**64) / 2**64
    ends = np.cumsum(self.weights) / np.sum(self.weights)
    last = len(self.weights) - 1
    return min(int(np.searchsorted(ends, place, side="right")), last)


def _once(part: Any) -> Iterator[packing_lib.Row]:
  if isinstance(part, stream.Stream):
    return part.rows()
  return (part[i] for i in range(len(part)))


def _shard(rows: Any, shard: int, shards: int, seed: int) -> grain.IterDataset:
  """Returns every so-many-th row of an endless shuffled order."""
  order = grain.MapDataset.range(len(rows)).shuffle(seed=seed).repeat()
  return (
    order[shard::shards]
    .map(rows.__getitem__)
    .to_iter_dataset(grain.ReadOptions(num_threads=0))
  )


class _Mixed(grain.IterDataset):
  """The rows of one shard of a mixture."""

  def __init__(
    self,
    mixture: Mixture,
    parts: Sequence[grain.IterDataset],
    shard: int,
    shards: int,
    seed: int,
  ):
    super().__init__()
    self.parts = parts
    # Row `at` of the shard is row `at shards + shard` of the run.
    self.pick = lambda at: mixture.part(at * shards + shard, seed)

  def __iter__(self) -> grain.DatasetIterator:
    return _MixedIterator(self)


class _MixedIterator(grain.DatasetIterator):
  def __init__(self, dataset: _Mixed):
    super().__init__()
    self._pick = dataset.pick
    self._parts = [iter(part) for part in dataset.parts]
    self._at = 0

  def __next__(self) -> packing_lib.Row:
    part = self._pick(self._at)
    self._at += 1
    return next(self._parts[part])

  def get_state(self) -> dict[str, Any]:
    return {
      "row": self._at,
      "parts": [part.get_state() for part in self._parts],
    }

  def set_state(self, state: dict[str, Any]) -> None:
    self._at = state["row"]
    for part, saved in zip(self._parts, state["parts"], strict=True):
      part.set_state(stream.restored(saved))

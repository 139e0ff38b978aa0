"""The order of training: batch k is a pure function of (seed, k).

It is the same batch whatever the number of processes: each holds a contiguous
share of its rows. Rows of random access are shuffled globally, anew in each
epoch: row r of batch k is element `k batch_size + r` of that endless order.
"""

from collections.abc import Callable, Iterator, Sequence
import hashlib
from typing import Any

import grain

from dllm_jax.core.types import Batch
from dllm_jax.data import packing
from dllm_jax.data.batches import batch_of, share
from dllm_jax.data.corpus import Corpus
from dllm_jax.data.streams import interleaved, Mixture, Stream

_THREADS = 2
_AHEAD = 4  # Batches that wait, so that the device never does.


def train_iterator(
  corpus: Corpus,
  *,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> "BatchIterator":
  """Returns the endless iterator of training batches.

  Args:
    corpus: what to train on.
    batch_size: rows of the whole batch, over all processes.
    seed: any integer; with the batch's number it determines the batch.
    process_index: this process among those that hold different rows.
    process_count: the number of those.

  Raises:
    ValueError: the processes do not divide the batch.
  """
  train, apart = corpus.train, corpus.texts_apart
  if isinstance(train, Stream | Mixture):
    share(batch_size, process_index, process_count)
    dataset = grain.experimental.ThreadPrefetchIterDataset(
      interleaved(
        train,
        batch_size=batch_size,
        seed=_seed(seed),
        process_index=process_index,
        process_count=process_count,
      ).map(lambda rows: batch_of(rows, apart)),
      prefetch_buffer_size=_AHEAD,
    )
    return BatchIterator(iter(dataset))
  return shuffled(
    len(train),
    lambda numbers: batch_of(packing.stack([train[i] for i in numbers]), apart),
    batch_size=batch_size,
    seed=seed,
    process_index=process_index,
    process_count=process_count,
  )


def shuffled(
  count: int,
  make: Callable[[Sequence[int]], Batch],
  *,
  batch_size: int,
  seed: int,
  process_index: int = 0,
  process_count: int = 1,
) -> "BatchIterator":
  """Returns endless batches of numbered rows, shuffled anew in each epoch.

  Args:
    count: how many rows there are.
    make: makes a batch of the rows of some numbers.
    batch_size: rows of the whole batch, over all processes.
    seed: any integer; with the batch's number it determines the batch.
    process_index: this process among those that hold different rows.
    process_count: the number of those.

  Raises:
    ValueError: the processes do not divide the batch.
  """
  rows = share(batch_size, process_index, process_count)
  source = _Batches(count, make, batch_size, rows, _seed(seed))
  dataset = grain.MapDataset.source(source).to_iter_dataset(
    grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=_AHEAD)
  )
  return BatchIterator(iter(dataset))


def merge_states(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Returns one state, for any number of processes, from that of each.

  Raises:
    ValueError: the states are not of the same batch.
  """
  batches = sorted({state["batch"] for state in states})
  if len(batches) != 1:
    raise ValueError(
      f"data states of different batches ({batches}) cannot be merged; save "
      "all processes at the same step"
    )
  merged = {"batch": batches[0]}
  shards = {k: v for s in states for k, v in s.get("shards", {}).items()}
  return merged | {"shards": shards} if shards else merged


class BatchIterator(Iterator[Batch]):
  """Endless batches with a state that JSON can hold.

  `get_state` is the same on every process, save for streams and mixtures,
  where each knows its own shards: there, save `merge_states` of all.
  """

  def __init__(self, iterator: grain.DatasetIterator):
    self._iterator = iterator

  def __next__(self) -> Batch:
    return next(self._iterator)

  def get_state(self) -> dict[str, Any]:
    """Returns where the iterator stands, for any number of processes."""
    state = self._iterator.get_state()
    return {"batch": state["next_index"]} if "next_index" in state else state

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues where a state was taken.

    Raises:
      ValueError: the state is that of another kind of data.
    """
    random_access = "next_index" in self._iterator.get_state()
    if random_access == ("shards" in state) or "batch" not in state:
      raise ValueError(
        "the saved data state is of another kind of data; restore with the "
        "data settings it was saved with"
      )
    if random_access:
      state = {"next_index": state["batch"]}
    self._iterator.set_state(state)

  def close(self) -> None:
    """Ends the threads that read ahead; nothing can follow."""
    self._iterator.close()
    # Grain closes again when the object goes, which fails at exit.
    self._iterator = None


def _seed(seed: int) -> int:
  """Returns 32 bits; spread, because epochs count up from it."""
  digest = hashlib.blake2b(str(int(seed)).encode(), digest_size=4).digest()
  return int.from_bytes(digest)


class _Batches:
  """One process's rows of batch k, by k."""

  def __init__(
    self,
    count: int,
    make: Callable[[Sequence[int]], Batch],
    batch_size: int,
    own: range,
    seed: int,
  ):
    self._make, self._batch_size, self._own = make, batch_size, own
    self._order = grain.MapDataset.range(count).shuffle(seed=seed).repeat()

  def __len__(self) -> int:
    return len(self._order) // self._batch_size

  def __getitem__(self, k: int) -> Batch:
    first = k * self._batch_size
    return self._make([self._order[first + r] for r in self._own])

"""Pairs of answers as batches: one pair a row, so that nothing tears it apart.

    chosen    prompt answer . . .    `Batch`'s own fields
    rejected  prompt answer . . . .  `Pairs.rejected`

A row ends with its answer; what is behind is padding. Batch k is a function of
(seed, k): its pairs are the next of an endless order that is shuffled anew in
each epoch. What a pair's samples hide depends on its number and on its epoch,
so that what the reference says of them can be read from a table.
"""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import Any, NamedTuple
import zlib

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from dllm_jax.core.types import Batch
from dllm_jax.data import blank
from dllm_jax.data.conversations import Example, Pair
from dllm_jax.parallel.sharding import RowShare

HELD_OUT = 2**31 - 1
"""The noise of pairs that are held out, in place of an epoch's."""


@struct.dataclass
class Pairs(Batch):
  """Rows of pairs; the fields of `Batch` are those of the chosen answers.

  Attributes:
    rejected: the rejected answers, of the same prompts.
    number: the pair's number in its data.
    noise: which of its samples are taken.
    samples: what the reference says of each, B_ref in nats: of the chosen
      answer's samples, then of the rejected one's. Arrays by row, which any mesh
      divides.
  """

  rejected: Batch | None = None
  number: Int[Array, "B"] | None = None
  noise: Int[Array, "B"] | None = None
  samples: tuple[Float[Array, "B"], ...] = ()

  @property
  def reference(self) -> Float[Array, "B 2 n"]:
    """What the reference says of each sample, nats."""
    return jnp.stack(self.samples, axis=1).reshape(self.number.shape[0], 2, -1)


class Share(NamedTuple):
  """Which rows of a batch are wanted.

  Attributes:
    index: the part.
    count: of how many equal ones.
  """

  index: int = 0
  count: int = 1


def both(batch: Pairs) -> Batch:
  """Returns chosen and rejected answers as rows 2i and 2i + 1."""
  names = (f.name for f in dataclasses.fields(Batch) if f.name != "texts_apart")
  chosen = Batch(**{name: getattr(batch, name) for name in names})
  join = lambda a, b: jnp.stack([a, b], axis=1).reshape(-1, *a.shape[1:])
  return jax.tree.map(join, chosen, batch.rejected)


def answer_tokens(pairs: Sequence[Pair]) -> Float[np.ndarray, "N 2"]:
  """Returns how many tokens each answer has."""
  sizes = [(p.chosen.counts.sum(), p.rejected.counts.sum()) for p in pairs]
  return np.asarray(sizes, np.float32).reshape(-1, 2)


def blank_pairs(rows: int, length: int, samples: int) -> Pairs:
  """Returns pairs of zeros that all count, with so many samples an answer."""
  ids = np.zeros((rows,), np.int32)
  return Pairs(
    **_fields(blank(rows, length)),
    rejected=blank(rows, length),
    number=ids,
    noise=ids,
    samples=(np.zeros((rows,), np.float32),) * (2 * samples),
  )


def checksum(pairs: Sequence[Pair]) -> int:
  """Returns a number that is another one for other pairs."""
  found = 0
  for pair in pairs:
    for example in (pair.chosen, pair.rejected):
      for part in (example.tokens, example.counts):
        found = zlib.crc32(np.asarray(part, "<i4").tobytes(), found)
  return found


def rows(
  pairs: Sequence[Pair],
  numbers: Sequence[int],
  noise: Sequence[int],
  samples: Float[np.ndarray, "B 2 n"],
  length: int,
) -> Pairs:
  """Returns the batch of some pairs; those of number -1 are padding.

  Args:
    pairs: all pairs.
    numbers: which of them are wanted.
    noise: which samples of each.
    samples: what the reference says of those, nats.
    length: tokens a row.
  """
  picked = [pairs[i] if i >= 0 else None for i in numbers]
  chosen, rejected = (
    _rows([pair and getattr(pair, name) for pair in picked], length)
    for name in ("chosen", "rejected")
  )
  columns = samples.reshape(len(picked), -1).T.astype(np.float32)
  return Pairs(
    **_fields(chosen),
    rejected=rejected,
    number=np.asarray(numbers, np.int32),
    noise=np.asarray(noise, np.int32),
    samples=tuple(np.ascontiguousarray(c) for c in columns),
  )


def _rows(examples: Sequence[Example | None], length: int) -> Batch:
  """Returns rows of examples, padding behind them; None is all padding."""
  shape = (len(examples), length)
  tokens, segments = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
  counts = np.zeros(shape, bool)
  for row, example in enumerate(examples):
    size = 0 if example is None else len(example.tokens)
    segments[row, :size] = 1
    if example is not None:
      tokens[row, :size], counts[row, :size] = example.tokens, example.counts
  slots = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
  return Batch(
    tokens=tokens,
    loss_mask=counts,
    segment_ids=segments,
    positions=np.where(segments > 0, slots, 0).astype(np.int32),
  )


def _fields(batch: Batch) -> dict[str, Any]:
  return {f.name: getattr(batch, f.name) for f in dataclasses.fields(Batch)}


class PairBatches(Iterator[Pairs]):
  """Endless batches of pairs, with a state that JSON can hold.

  Args:
    pairs: what to train on.
    table: what the reference says, `[sets, pairs, 2, n]`: epoch e reads set
      `e % sets`, in nats.
    batch_size: pairs of a whole batch.
    length: tokens a row.
    seed: of the order.
    share: which rows of each batch are this process's.
  """

  def __init__(
    self,
    pairs: Sequence[Pair],
    table: Float[np.ndarray, "S N 2 n"],
    *,
    batch_size: int,
    length: int,
    seed: int,
    share: RowShare | Share = Share(),
  ):
    self._pairs, self._table, self._length = pairs, table, length
    self._seed, self._size, self._batch = seed & 0xFFFFFFFF, batch_size, 0
    part = batch_size // share.count
    self._own = np.arange(part) + share.index * part
    self._orders: dict[int, np.ndarray] = {}

  def __next__(self) -> Pairs:
    at = self._batch * self._size + self._own
    self._batch += 1
    epochs = at // len(self._pairs)
    numbers = [
      self._order(int(epoch))[i % len(self._pairs)]
      for epoch, i in zip(epochs, at, strict=True)
    ]
    noise = epochs % len(self._table)
    samples = self._table[noise, numbers]
    return rows(self._pairs, numbers, noise, samples, self._length)

  def get_state(self) -> dict[str, Any]:
    """Returns where the iterator stands, for any number of processes."""
    return {"batch": self._batch}

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues where a state was taken."""
    self._batch = state["batch"]

  def _order(self, epoch: int) -> np.ndarray:
    """Returns the order of an epoch, a function of the seed and of it."""
    if epoch not in self._orders:
      rng = np.random.default_rng((self._seed, epoch))
      order = rng.permutation(len(self._pairs))
      kept = self._orders.get(epoch - 1)
      self._orders = {epoch: order} | (
        {} if kept is None else {epoch - 1: kept}
      )
    return self._orders[epoch]

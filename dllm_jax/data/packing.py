"""Tokenised documents in rows of a fixed length.

Documents are laid end to end and cut every `length` tokens; the last row is
padded. As `packed`, each document is a segment of its own, which attention does
not leave; as `slices`, everything is one text and a row is one segment:

    documents  a a a | b b b b b | c c      length 4
    rows       a a a b | b b b b | c c . .
    segments   1 1 1 2 | 1 1 1 1 | 1 1 0 0  packed
               1 1 1 1 | 1 1 1 1 | 1 1 0 0  slices

numpy only: tokenising processes use it without jax.
"""

from collections.abc import Iterable, Sequence
import dataclasses
from typing import Literal, NamedTuple

from jaxtyping import Int
import numpy as np

from dllm_jax.data import source
from dllm_jax.data.tokenizer import Tokenizer

Packing = Literal["slices", "packed"]


class Row(NamedTuple):
  """One row of a batch.

  Attributes:
    tokens: `[L]`, int32.
    segments: the document of each, from 1; 0 is padding. `[L]`, int32.
    counts: which tokens count, `[L]`; None: all but padding.
  """

  tokens: np.ndarray
  segments: np.ndarray
  counts: np.ndarray | None = None

  @property
  def mask(self) -> np.ndarray:
    """Which tokens count, `[L]`."""
    return self.segments > 0 if self.counts is None else self.counts


def check(packing: str, length: int, held_out: float) -> None:
  """Raises ValueError if a setting that every reader shares is not legal."""
  if packing not in ("slices", "packed"):
    raise ValueError(
      f"packing {packing!r} is unknown; legal are 'slices' (a text cut into "
      "rows) and 'packed' (documents kept apart)"
    )
  if length < 1:
    raise ValueError(f"length is {length}; a row has at least one token")
  if not 0 <= held_out < 1:
    raise ValueError(
      f"held_out is {held_out}; it is a fraction from 0 to below 1"
    )


@dataclasses.dataclass(frozen=True)
class TextSize:
  """How much text some tokens stand for.

  Attributes:
    tokens: tokens, with those that end documents.
    characters: characters (code points).
    bytes: bytes of UTF-8.
  """

  tokens: int = 0
  characters: int = 0
  bytes: int = 0

  def __add__(self, other: "TextSize") -> "TextSize":
    return TextSize(
      self.tokens + other.tokens,
      self.characters + other.characters,
      self.bytes + other.bytes,
    )

  @property
  def characters_per_token(self) -> float:
    """Divides bits per token into bits per character."""
    return self.characters / self.tokens

  @property
  def bytes_per_token(self) -> float:
    """Divides bits per token into bits per byte."""
    return self.bytes / self.tokens


def tokenise(
  text: str, path: str, tokenizer: Tokenizer
) -> Int[np.ndarray, "n"]:
  """Returns the ids of a document: begun and ended as a text is, or ended by eos.

  Args:
    text: the document.
    path: its file, for messages.
    tokenizer: the tokenizer.

  Raises:
    ValueError: the tokenizer cannot encode it; the message names the file.
  """
  try:
    ids = tokenizer.prompt(text)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error
  end = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
  return np.append(ids, tokenizer.after_ids or end).astype(np.int32)


def text_size(text: str, ids: Sequence[int]) -> TextSize:
  """Returns the size of one tokenised text."""
  data = text.encode(errors="surrogatepass")
  return TextSize(len(ids), len(text), len(data))


class Rows:
  """Rows of documents that lie in memory, by index.

  Args:
    documents: the ids of each document.
    length: tokens a row.
    packing: whether documents are segments of their own.
  """

  def __init__(
    self, documents: Iterable[np.ndarray], *, length: int, packing: Packing
  ):
    documents = [d for d in documents if len(d)]
    ends = np.cumsum([len(d) for d in documents], dtype=np.int64)
    self.length = length
    self.tokens = (
      np.concatenate(documents).astype(np.int32)
      if documents
      else np.zeros((0,), np.int32)
    )
    # Where a segment begins, the start of a row aside.
    self.starts = ends[:-1] if packing == "packed" else ends[:0]

  def __len__(self) -> int:
    return -(-len(self.tokens) // self.length)

  def __getitem__(self, index: int) -> Row:
    start = index * self.length
    tokens = self.tokens[start : start + self.length]
    if not len(self.starts):
      return pad(tokens, np.ones(len(tokens), np.int32), self.length)
    inside = np.arange(start, start + len(tokens))
    segments = np.searchsorted(self.starts, inside, side="right")
    segments = renumber(segments.astype(np.int32))
    return pad(tokens, segments, self.length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomRows:
  """Rows of even random tokens, for what does not depend on text: speed.

  Attributes:
    tokens: legal ids, from 0; the mask comes after them.
    length: tokens a row.
  """

  tokens: int
  length: int

  def __len__(self) -> int:
    return 2**20

  def __getitem__(self, index: int) -> Row:
    """Returns a row; a function of the index."""
    rng = np.random.default_rng(index)
    row = rng.integers(self.tokens, size=self.length, dtype=np.int32)
    return Row(row, np.ones_like(row))


def pad(tokens: np.ndarray, segments: np.ndarray, length: int) -> Row:
  """Returns a row of `length` tokens; what is missing is segment 0."""
  if len(tokens) == length:
    return Row(tokens, segments)
  row = np.zeros((2, length), np.int32)
  row[:, : len(tokens)] = tokens, segments
  return Row(row[0], row[1])


def stack(rows: Sequence[Row]) -> Row:
  """Returns rows as one of arrays `[B, L]`, what counts written out."""
  return Row(
    np.stack([row.tokens for row in rows]),
    np.stack([row.segments for row in rows]),
    np.stack([row.mask for row in rows]),
  )


def renumber(segments: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
  """Returns ascending segment ids, counted from 1."""
  return segments if not len(segments) else segments - segments[0] + 1


def positions(segments: Int[np.ndarray, "B L"]) -> Int[np.ndarray, "B L"]:
  """Returns the position of each token inside its segment, 0 on padding."""
  index = np.broadcast_to(np.arange(segments.shape[-1]), segments.shape)
  starts = np.diff(segments, axis=-1, prepend=-1) != 0
  since = index - np.maximum.accumulate(np.where(starts, index, 0), axis=-1)
  return np.where(segments > 0, since, 0).astype(np.int32)


class Counter:
  """Tokenises documents and keeps count.

  Attributes:
    documents: documents with text.
    empty: documents without.
    train: the size of the training text.
    held_out: the size of the held-out text.
  """

  def __init__(self, tokenizer: Tokenizer, held_out: float):
    self._tokenizer, self._fraction = tokenizer, held_out
    self.documents = self.empty = 0
    self.train = self.held_out = TextSize()

  def __call__(
    self, document: source.Document
  ) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Returns the ids for training and the held-out ones, None for no text."""
    if not document.text.strip():
      self.empty += 1
      return None, None
    self.documents += 1
    parts = source.split(document, self._fraction)
    train, held_out = (
      tokenise(part, document.path, self._tokenizer) if part else None
      for part in parts
    )
    if train is not None:
      self.train += text_size(parts[0], train)
    if held_out is not None:
      self.held_out += text_size(parts[1], held_out)
    return train, held_out

"""Tokens by their numbers: checks that tokenizers share, and texts of numbers."""

from collections.abc import Iterable, Sequence
import dataclasses
import itertools
import json

import numpy as np

MASK_GLYPH = "▁"


def legal(ids: Sequence[int], vocab_size: int) -> np.ndarray:
  """Returns ids as an array.

  Raises:
    ValueError: one is not in the vocabulary.
  """
  ids = np.asarray(ids, np.int64).reshape(-1)
  if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
    raise ValueError(
      f"token id {ids.max() if ids.min() >= 0 else ids.min()} is not in the "
      f"vocabulary; legal ids are 0 to {vocab_size - 1}"
    )
  return ids


def unmasked(ids: np.ndarray, mask_id: int) -> Iterable[tuple[bool, list[int]]]:
  """Yields (whether they are masks, ids) for each run of ids."""
  for masked, run in itertools.groupby(ids.tolist(), lambda i: i == mask_id):
    yield masked, list(run)


def ends(given: Sequence[int], eos_id: int | None) -> tuple[int, ...]:
  """Returns what ends a row: the ids that are given, or else the end of a text."""
  return tuple(given) or (() if eos_id is None else (eos_id,))


class Plain:
  """Tokenizers that encode a text as its pieces, and put nothing around it."""

  pad_id = eos_id = bos_id = None
  begin_ids = after_ids = end_ids = ()

  def prompt(self, text: str) -> np.ndarray:
    """Returns the int32 ids of a text to go on from: those of the text."""
    return self.encode(text)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns `encode` of each text."""
    return [self.encode(text) for text in texts]

  def encode_spans(self, parts: Sequence[str | int]) -> list[int | None]:
    """Returns the ids of texts, and None at each of the slots between.

    Args:
      parts: texts, and how many slots there are between them.
    """
    slots: list[int | None] = []
    for part in parts:
      if isinstance(part, int):
        slots += [None] * part
      else:
        slots += [int(token) for token in self.encode(part)] if part else []
    return slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers(Plain):
  """Text is token ids in decimal, with spaces between.

  Attributes:
    vocab_size: the number of ids, the mask included.
    mask_id: the mask token.
    pad_id: the padding token, or None.
    eos_id: what ends a document, or None.
    bos_id: the token that is called the beginning of a text, or None.
    end_ids: what ends a row; empty for `eos_id` alone.
  """

  vocab_size: int
  mask_id: int
  pad_id: int | None = None
  eos_id: int | None = None
  bos_id: int | None = None
  end_ids: tuple[int, ...] = ()

  def __post_init__(self):
    object.__setattr__(self, "end_ids", ends(self.end_ids, self.eos_id))

  def encode(self, text: str) -> np.ndarray:
    """Returns the int32 ids of a text.

    Raises:
      ValueError: a word is no id, or is the mask's.
    """
    words = text.split()
    for word in words:
      legal = word.isascii() and word.isdigit() and int(word) < self.vocab_size
      if not legal or int(word) == self.mask_id:
        raise ValueError(
          f"{word[:20]!r} is no token: this model has no tokenizer, so text is"
          f" numbers from 0 to {self.vocab_size - 1}, without the mask"
          f" {self.mask_id}; or put a tokenizer.json beside its weights"
        )
    return np.array([int(word) for word in words], np.int32)

  def decode(
    self,
    ids: Sequence[int],
    *,
    mask: str = MASK_GLYPH,
    special: bool = False,
  ) -> str:
    """Returns the text of ids, each mask token shown as `mask`.

    Raises:
      ValueError: an id is not in the vocabulary.
    """
    ids = legal(ids, self.vocab_size).tolist()
    return " ".join(mask if i == self.mask_id else str(i) for i in ids)

  def to_json(self) -> str:
    """Returns the whole tokenizer as JSON."""
    return json.dumps({"kind": "numbers", **dataclasses.asdict(self)})

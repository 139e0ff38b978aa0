"""Tokens by their numbers, for models without a tokenizer, and random ones."""

from collections.abc import Sequence
import dataclasses
import json

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbers:
  """Text is token ids in decimal, with spaces between.

  Attributes:
    vocab_size: the number of ids, the mask included.
    mask_id: the mask token.
    pad_id: the padding token, or None.
    eos_id: what ends a document, or None.
    bos_id: what begins a document, or None.
  """

  vocab_size: int
  mask_id: int
  pad_id: int | None = None
  eos_id: int | None = None
  bos_id: int | None = None

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

  def decode(self, ids: Sequence[int], *, mask: str = "▁") -> str:
    """Returns the text of ids, each mask token shown as `mask`.

    Raises:
      ValueError: an id is not in the vocabulary.
    """
    ids = np.asarray(ids).reshape(-1).tolist()
    for i in ids:
      if not 0 <= i < self.vocab_size:
        raise ValueError(
          f"token id {i} is not in the vocabulary; legal ids are 0 to"
          f" {self.vocab_size - 1}"
        )
    return " ".join(mask if i == self.mask_id else str(i) for i in ids)

  def to_json(self) -> str:
    """Returns the whole tokenizer as JSON."""
    return json.dumps({"kind": "numbers", **dataclasses.asdict(self)})


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

  def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns a row and its segment ids; a function of the index."""
    rng = np.random.default_rng(index)
    row = rng.integers(self.tokens, size=self.length, dtype=np.int32)
    return row, np.ones_like(row)

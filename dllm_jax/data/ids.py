"""Checks and cuts of texts and token ids that tokenizers share."""

from collections.abc import Iterable, Sequence
import itertools

import numpy as np

MASK_GLYPH = "▁"
# Longer texts are encoded in pieces: the time and memory of one call of the
# tokenizers package grow faster than the text.
_PIECE_CHARACTERS = 2**20


def pieces(text: str) -> Iterable[str]:
  """Yields a text in pieces of bounded size, cut after a line if possible."""
  start = 0
  while start < len(text):
    stop = start + _PIECE_CHARACTERS
    if stop < len(text):
      stop = text.rfind("\n", start, stop) + 1 or stop
    yield text[start:stop]
    start = stop


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

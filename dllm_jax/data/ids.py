"""Checks and cuts of token ids that every tokenizer needs to decode."""

from collections.abc import Iterable, Sequence
import itertools

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

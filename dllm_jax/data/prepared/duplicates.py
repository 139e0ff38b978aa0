"""Which documents are repetitions of earlier ones: exact, in bounded memory.

A document is repeated if one before it, in the order of files and in whatever
share, has the same text. Texts are compared by hashes of 128 bits, one file of
them a piece. Some own pieces are looked at together, and all earlier hashes go
past them: memory is that of `_AT_ONCE` hashes, whatever the corpus, and the
hashes are read once for each `_AT_ONCE` documents of the share.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from dllm_jax.data.prepared.piece import HASH_BYTES
from dllm_jax.data.prepared.progress import Progress

_AT_ONCE = 2**21
_NEVER = np.iinfo(np.int64).max


def repeated(
  progress: Progress, pieces: Sequence[int]
) -> Iterator[dict[int, list[int]]]:
  """Yields for some pieces after others their repeated documents, by number.

  Args:
    progress: a directory that has the hashes of all pieces.
    pieces: those that are asked about, in ascending order.
  """
  some: dict[int, np.ndarray] = {}
  for piece in pieces:
    some[piece] = _read(progress, piece)
    if sum(map(len, some.values())) >= _AT_ONCE:
      yield _among(progress, some)
      some = {}
  if some:
    yield _among(progress, some)


def _read(progress: Progress, piece: int) -> np.ndarray:
  return np.frombuffer(progress.hashes(piece), f"S{HASH_BYTES}")


def _among(
  progress: Progress, some: dict[int, np.ndarray]
) -> dict[int, list[int]]:
  known, inverse = np.unique(
    np.concatenate([*some.values()]), return_inverse=True
  )
  first = np.full(len(known), _NEVER)  # the first piece that has each text
  for piece in range(max(some) + 1):
    here = some[piece] if piece in some else _read(progress, piece)
    here = np.unique(here)
    at = np.searchsorted(known, here)
    at[at == len(known)] = 0
    at = at[known[at] == here] if len(known) else at[:0]
    first[at] = np.minimum(first[at], piece)
  found, start = {}, 0
  for piece, hashes in some.items():
    own = inverse[start : start + len(hashes)]
    start += len(hashes)
    kept = np.zeros(len(own), bool)
    kept[np.unique(own, return_index=True)[1]] = True  # the first in the piece
    kept &= first[own] == piece
    found[piece] = np.flatnonzero(~kept).tolist()
  return found

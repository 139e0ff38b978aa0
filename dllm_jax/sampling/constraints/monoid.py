r"""What tokens do to the states of an automaton of bytes: its transition monoid.

A text w takes states to states, f_w(s), some to none; and one byte before it
f_{bw}(s) = f_w(f_b(s)). Tokens number a hundred thousand, but the maps that
their texts make are few: of two texts with one map it is enough to go on with
one. So tokens are read from their ends, all at once, a byte at a time, and each
map is made once.
"""

from collections.abc import Sequence

import numpy as np

_NOWHERE, _STAY = 0, 1  # the map of no way at all, and that of the empty text


def mixed(*parts: np.ndarray) -> np.ndarray:
  """Returns a number for each tuple, whose sums are as good as random."""
  # From a number that no part has: what is zero would be nothing in a sum.
  mixed = np.full(len(parts[0]), 0x94D049BB133111EB, np.uint64)
  for i, part in enumerate(parts):
    mixed = (mixed ^ part.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29 + i)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
  return mixed


def hashes(group: np.ndarray, count: int, *parts: np.ndarray) -> np.ndarray:
  """Returns a number for each group: equal for equal sets of its parts.

  Args:
    group: the group of each part, under `count`.
    count: how many groups there are; 0 is the number of one without parts.
    *parts: arrays whose tuples are summed.
  """
  sums = np.zeros(count, np.uint64)
  np.add.at(sums, group, mixed(*parts))
  return sums


def _spread(first: np.ndarray, count: np.ndarray):
  """Returns (which, where) of runs of so many from each first on."""
  which = np.repeat(np.arange(len(count)), count)
  behind = first - (np.cumsum(count) - count)
  return which, behind[which] + np.arange(len(which))


class _Maps:
  """The maps that were met, by number: pairs (from, to) in runs."""

  def __init__(self, table: np.ndarray):
    self._states = len(table)
    # The ways of a byte to a state, in order of both.
    tail, byte = np.nonzero(table >= 0)
    key = byte * self._states + table[tail, byte]
    order = np.argsort(key, kind="stable")
    self._tail, self._key = tail[order], key[order]
    here = np.arange(self._states)
    self.tail, self.head = here, here
    self.begins = np.array([0, 0, self._states])
    self._known = {0: _NOWHERE, int(mixed(here, here).sum()): _STAY}
    self._before: dict[int, int] = {}

  def before(self, codes: np.ndarray) -> np.ndarray:
    """Returns the map of a byte before a text, for codes 256 map + byte."""
    new = np.array([c for c in codes.tolist() if c not in self._before], int)
    if len(new):
      self._before |= zip(new.tolist(), self._made(new), strict=True)
    return np.array([self._before[c] for c in codes.tolist()], np.int32)

  def _made(self, codes: np.ndarray) -> list[int]:
    """Returns the maps of such codes, those that are new numbered on."""
    text, byte = codes // 256, codes % 256
    which, where = self.pairs(text)
    key = byte[which] * self._states + self.tail[where]
    low = np.searchsorted(self._key, key)
    again, way = _spread(low, np.searchsorted(self._key, key, "right") - low)
    which, tail, head = which[again], self._tail[way], self.head[where][again]
    found = hashes(which, len(codes), tail, head).tolist()
    fresh = np.zeros(len(codes), bool)
    for i, mark in enumerate(found):
      if mark not in self._known:
        self._known[mark], fresh[i] = len(self._known), True
    keep = fresh[which]
    count = np.bincount(which, minlength=len(codes))[fresh]
    self.begins = np.append(self.begins, self.begins[-1] + np.cumsum(count))
    self.tail = np.append(self.tail, tail[keep])
    self.head = np.append(self.head, head[keep])
    return [self._known[mark] for mark in found]

  def pairs(self, maps: np.ndarray):
    """Returns (which of the maps, where its pairs lie)."""
    return _spread(self.begins[maps], np.diff(self.begins)[maps])


def maps_of(
  table: np.ndarray, tokens: Sequence[bytes]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Returns (map of each token, map, from, to): what each does, and the maps.

  Args:
    table: the state behind each state and byte, -1 for none, `[S, 256]`.
    tokens: what each writes.

  Returns:
    The map of each token, `[V]`, -1 for one that writes nothing or has no way
    from any state; and the pairs of all maps, those of each in a row, `[N]`.
  """
  lengths = np.array([len(token) for token in tokens], np.int64)
  text = np.frombuffer(b"".join(tokens), np.uint8).astype(np.int64)
  ends = np.cumsum(lengths) - 1
  maps, of = _Maps(table), np.where(lengths > 0, _STAY, _NOWHERE)
  at, depth = np.flatnonzero(lengths), 0
  while len(at):
    code = of[at] * 256 + text[ends[at] - depth]
    codes, inverse = np.unique(code, return_inverse=True)
    of[at] = maps.before(codes)[inverse]
    depth += 1
    at = at[(lengths[at] > depth) & (of[at] != _NOWHERE)]
  used, kind = np.unique(of, return_inverse=True)
  used, kind = used[used != _NOWHERE], kind - (used[0] == _NOWHERE)
  which, where = maps.pairs(used)
  return kind, which, maps.tail[where], maps.head[where]

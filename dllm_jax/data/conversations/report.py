"""What is said of conversations before training on them."""

import os
import sys
from typing import NamedTuple

from dllm_jax.data.conversations.examples import Count, Example
from dllm_jax.data.packing import Row
from dllm_jax.data.tokenizer import Tokenizer

_COLOUR, _PLAIN = ("\x1b[32m", "\x1b[0m"), (">>", "<<")
_SHOWN = 40  # Tokens of a part, at either end.
_FEW = 2  # Equal tokens at the end that are written out.


class Report(NamedTuple):
  """What was read.

  Attributes:
    path: from where.
    form: the form of the rows, and its fields.
    count: what became of them.
    train: conversations to train on.
    held_out: conversations to evaluate on.
    rows: rows that hold those to train on.
    first: the first row.
    tokenizer: writes it out.
  """

  path: str
  form: str
  count: Count
  train: int
  held_out: int
  rows: int
  first: Row
  tokenizer: Tokenizer

  def __str__(self) -> str:
    """Returns the line and the first row, what counts of it marked."""
    c = self.count
    said = [f"{self.path}: {c.rows:,} rows of {self.form}"]
    said.append(f"{self.train:,} to train on in {self.rows:,} rows of tokens")
    said.append(f"{self.held_out:,} held out")
    if c.dropped:
      said.append(f"{c.dropped:,} too long, left out")
    if c.shortened:
      said.append(f"{c.shortened:,} too long, shortened")
    if c.bad:
      said.append(f"{c.bad:,} bad, left out (the first: {c.reason})")
    return ", ".join(said) + "\n" + self._shown()

  def _shown(self) -> str:
    """Returns the first row as text; what counts is green, or >>marked<<."""
    begin, end = _COLOUR if in_colour() else _PLAIN
    own = self.first.segments == 1
    ids, counts = self.first.tokens[own], self.first.mask[own]
    last = 1 + int((ids != ids[-1]).nonzero()[0].max(initial=-1))
    if len(ids) - last > _FEW:  # What fills the row.
      same, ids = len(ids) - last, ids[: last + 1]
    else:
      same = 0
    parts, start = [], 0
    for stop in range(1, len(ids) + 1):
      if stop < len(ids) and counts[stop] == counts[start]:
        continue
      text = self._text(ids[start:stop])
      text += f" x {same:,}" if same and stop == len(ids) else ""
      parts.append(f"{begin}{text}{end}" if counts[start] else text)
      start = stop
    return "".join(parts)

  def _text(self, ids) -> str:
    write = lambda some: self.tokenizer.decode(some, special=True)
    if len(ids) <= 2 * _SHOWN:
      return write(ids)
    between = f" ... {len(ids) - 2 * _SHOWN} tokens ... "
    return write(ids[:_SHOWN]) + between + write(ids[-_SHOWN:])


def in_colour() -> bool:
  """Whether standard output shows colours, or is told to (no-color.org)."""
  if os.environ.get("NO_COLOR"):
    return False
  return bool(os.environ.get("FORCE_COLOR")) or sys.stdout.isatty()


def prompts(
  examples: list[Example], length: int, number: int
) -> tuple[tuple[tuple[int, ...], int], ...]:
  """Returns some prompts, and how many tokens each is to be answered in.

  Twice those of the answer that is known, as far as the row has room.
  """
  found = []
  for example in examples:
    given, n = example.given, len(example.tokens)
    if 0 < given < length and len(found) < number:
      room = min(length - given, max(2 * (n - given), 16))
      found.append((tuple(example.tokens[:given].tolist()), room))
  return tuple(found)

"""Infill templates: text with spans to be written, `"To be [MASK*8] not"`."""

from collections.abc import Callable, Sequence
import re

_OPEN = re.compile(r"\[MASK")
_SPAN = re.compile(r"\[MASK(?:\*([0-9]+))?\]")


def parse(
  template: str, encode: Callable[[str], Sequence[int]]
) -> list[int | None]:
  """Returns token ids, with None at each slot of a mask span.

  `[MASK]` is one slot and `[MASK*n]` is n of them, counted in tokens. The text
  between spans is encoded piece by piece, spaces included.

  Args:
    template: text with at least one span.
    encode: the tokenizer: text to token ids, without special tokens.

  Raises:
    ValueError: a span is malformed or empty, or there is none.
  """
  slots: list[int | None] = []
  at, spans = 0, 0
  while (found := _OPEN.search(template, at)) is not None:
    span = _SPAN.match(template, found.start())
    if span is None:
      raise ValueError(
        f"malformed mask span {template[found.start() :][:16]!r}: write [MASK] "
        "for one token or [MASK*8] for eight"
      )
    count = 1 if span[1] is None else int(span[1])
    if count < 1:
      raise ValueError(f"empty mask span {span[0]}: ask for at least one token")
    slots += _encoded(template[at : found.start()], encode)
    slots += [None] * count
    at, spans = span.end(), spans + 1
  if not spans:
    raise ValueError(
      f"the template {template[:40]!r} has no mask span: write [MASK*8] where "
      "eight tokens are wanted"
    )
  return slots + _encoded(template[at:], encode)


def _encoded(text: str, encode: Callable[[str], Sequence[int]]) -> list[int]:
  return [int(token) for token in encode(text)] if text else []

"""JSON: a line a record, one array of records, or one record.

Names do not say which: `.json.gz` is lines in C4 and Dolma and an array
elsewhere, so content does. `.jsonl` and `.ndjson` are lines.
"""

import codecs
from collections.abc import Iterator
import json
from typing import Any, IO, Literal

from dllm_jax.data.formats import base, compressed, text

_LINES = (".jsonl", ".ndjson")
_SPACE = " \t\r\n"


def layout(path: str) -> Literal["lines", "values", "text"]:
  """Returns how JSON lies in a file; "text" where it begins with none."""
  if compressed.suffixes(path)[0] in _LINES:
    return "lines"
  head = b""
  with compressed.opened(path) as file:
    for block in compressed.blocks(file):
      head = (head + block).lstrip()
      if head[:1] not in (b"{", b"") or b"\n" in head:
        break
  if head.startswith(b"["):
    return "values"
  try:
    json.loads(head.split(b"\n", 1)[0] or b"{}")
    return "lines"
  except ValueError:
    return "values" if head.startswith(b"{") else "text"


def spans(path: str, form: base.Format, span_bytes: int) -> list[base.Span]:
  """Returns the pieces of a file; what is not lines is a single piece."""
  if layout(path) != "lines":
    return [base.Span(path)]
  return text.cut(path, b"\n", span_bytes)


def records(
  span: base.Span, field: str | None = None
) -> Iterator[tuple[str, Any]]:
  """Yields the records that begin in a piece, whole.

  Raises:
    ValueError: not UTF-8, not JSON, damaged.
  """
  path = span.path
  lines = layout(path) == "lines"
  with compressed.opened(path) as file:
    yield from _lines(file, span) if lines else _values(file, path)


def _lines(file: IO[bytes], span: base.Span) -> Iterator[tuple[str, Any]]:
  path = span.path
  for at, line in text.records(file, b"\n", span):
    if not line.strip():
      continue
    try:
      record = json.loads(base.decoded(line, path, at))
    except json.JSONDecodeError as error:
      raise ValueError(
        f"{path} is not JSONL: the line at byte {at} is not JSON "
        f"({error.msg}); write one JSON object a line"
      ) from error
    yield f"{path}: the line at byte {at}", record


def _values(file: IO[bytes], path: str) -> Iterator[tuple[str, Any]]:
  """Yields the elements of one array, or the one record, of a file."""
  buffer = _Buffer(file, path)
  array = buffer.peek() == "["
  if array:
    buffer.at += 1
  count = 0
  while (buffer.peek() or "]") != "]":
    if array and count:
      buffer.expect(",")
    yield f"{path}: record {count}", buffer.value()
    count += 1
    if not array:
      break
  if array:
    buffer.expect("]")
  if buffer.peek():
    raise buffer.error()


class _Buffer:
  """The characters of a file from a place on, as many as a value needs."""

  def __init__(self, file: IO[bytes], path: str):
    self._file, self._path = file, path
    self._decode = codecs.getincrementaldecoder("utf-8")().decode
    self._scan = json.JSONDecoder().raw_decode
    self._text, self.at, self._ended = "", 0, False

  def peek(self) -> str:
    """Returns the next character that is no space; "" at the end."""
    while True:
      rest = self._text[self.at : self.at + 1]
      if rest and rest not in _SPACE:
        return rest
      if rest:
        self.at += 1
      elif self._ended:
        return ""
      else:
        self._more(compressed.BLOCK_BYTES)

  def expect(self, character: str) -> None:
    """Goes past a character, or raises."""
    if self.peek() != character:
      raise self.error()
    self.at += 1

  def value(self) -> Any:
    """Returns the next value."""
    self.peek()
    size = compressed.BLOCK_BYTES
    while True:
      try:
        value, self.at = self._scan(self._text, self.at)
        return value
      except json.JSONDecodeError as error:
        if self._ended:
          raise self.error() from error
      self._more(size)
      size *= 2  # Few tries, however long a value is.

  def error(self) -> ValueError:
    """Returns what is wrong with the file."""
    return ValueError(
      f"{self._path} is neither JSON lines, nor one array, nor one object; "
      "write one JSON object a line"
    )

  def _more(self, size: int) -> None:
    block = self._file.read(size)
    self._ended = not block
    try:
      more = self._decode(block, final=self._ended)
    except UnicodeDecodeError as error:
      raise ValueError(f"{self._path} is not UTF-8 text; convert it") from error
    self._text, self.at = self._text[self.at :] + more, 0

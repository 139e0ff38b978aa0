"""Text files: one running text each, or documents with a separator between."""

from collections.abc import Iterator
from typing import IO

from dllm_jax.core import paths
from dllm_jax.data.formats import base, compressed


def spans(path: str, form: base.Format, span_bytes: int) -> list[base.Span]:
  """Returns the pieces of a file; a running or packed one is a single piece."""
  separator = form.document_separator
  if separator is None:
    return [base.Span(path)]
  return cut(path, separator.encode(), span_bytes)


def cut(path: str, delimiter: bytes, span_bytes: int) -> list[base.Span]:
  """Returns the pieces of a file of delimited records."""
  if compressed.suffixes(path)[1] or _overlaps(delimiter):
    return [base.Span(path)]
  size = paths.place(path).stat().length
  cuts = [*range(0, size, span_bytes), None]
  return [base.Span(path, *c) for c in zip(cuts[:-1], cuts[1:], strict=True)]


def _overlaps(delimiter: bytes) -> bool:
  """Whether two occurrences may overlap, so that midway entry is ambiguous."""
  return any(delimiter[:n] == delimiter[-n:] for n in range(1, len(delimiter)))


def read(span: base.Span, form: base.Format) -> Iterator[base.Document]:
  """Yields the documents that begin in a piece.

  Raises:
    ValueError: not UTF-8, or damaged.
  """
  path, separator = span.path, form.document_separator
  with compressed.opened(path) as file:
    if separator is None:
      yield base.Document(base.decoded(file.read(), path, 0), path, True)
      return
    for at, record in records(file, separator.encode(), span):
      yield base.Document(base.decoded(record, path, at), path)


def records(
  file: IO[bytes], delimiter: bytes, span: base.Span
) -> Iterator[tuple[int, bytes]]:
  """Yields (offset, bytes) of the records that begin in a piece.

  A piece that starts midway looks one delimiter back: a record that begins
  exactly at its start is its own.
  """
  at = max(span.start - len(delimiter), 0)
  skip = span.start > 0
  if skip:
    file.seek(at)
  rest = b""
  for block in compressed.blocks(file):
    *whole, rest = (rest + block).split(delimiter)
    for record in whole:
      if not skip:
        if span.stop is not None and at >= span.stop:
          return
        yield at, record
      skip = False
      at += len(record) + len(delimiter)
  if rest and not skip and (span.stop is None or at < span.stop):
    yield at, rest

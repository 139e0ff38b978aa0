"""Parquet: a piece is a row group, and only the text's columns are read."""

from collections.abc import Iterator
import contextlib
from typing import Any

from dllm_jax.data.formats import base, columns

_ROWS = 1024  # Read at a time.
# What Parquet puts between a list and its elements.
_INNER = {"list", "element", "item", "bag", "array_element", "array"}


def spans(path: str, form: base.Format, span_bytes: int) -> list[base.Span]:
  """Returns the row groups of a file."""
  with _opened(path) as file:
    return [base.Span(path, g, g + 1) for g in range(file.num_row_groups)]


def records(
  span: base.Span, field: str | None = None
) -> Iterator[tuple[str, Any]]:
  """Yields the records of row groups.

  Raises:
    ValueError: no such column.
    ImportError: pyarrow is not installed.
  """
  path = span.path
  with _opened(path) as file:
    names = None
    if field is not None:
      top = columns.column(file.schema_arrow.names, field, path)
      names = _leaves(file, top, field)
    stop = file.num_row_groups if span.stop is None else span.stop
    batches = file.iter_batches(
      _ROWS,
      row_groups=list(range(span.start, stop)),
      columns=names,
    )
    for batch in batches:
      yield from columns.records(batch, field, path)


def _leaves(file: Any, top: str, field: str) -> list[str]:
  """Returns the columns of a file that hold the text, lists aside."""
  wanted = field[len(top) + 1 :].split(".") if field != top else []
  found = []
  for i in range(len(file.schema)):
    path = file.schema.column(i).path
    if path != top and not path.startswith(f"{top}."):
      continue
    names = path[len(top) + 1 :].split(".")
    names = [n for n in names if n not in _INNER or n in wanted]
    if names[: len(wanted)] == wanted:
      found.append(path)
  return found or [top]


def _opened(path: str) -> contextlib.AbstractContextManager:
  reader = columns.arrow().parquet.ParquetFile
  return columns.reading(path, "a Parquet", reader)

"""Arrow files and streams, such as those in folders of Hugging Face datasets."""

from collections.abc import Iterator
import contextlib
from typing import Any

from dllm_jax.data.formats import base, columns

_MAGIC = b"ARROW1"


def spans(path: str, form: base.Format, span_bytes: int) -> list[base.Span]:
  """Returns the batches of a file; a stream is a single piece."""
  with _opened(path) as reader:
    if not hasattr(reader, "num_record_batches"):
      return [base.Span(path)]
    batches = range(reader.num_record_batches)
    return [base.Span(path, i, i + 1) for i in batches]


def records(
  span: base.Span, field: str | None = None
) -> Iterator[tuple[str, Any]]:
  """Yields the records of a piece.

  Raises:
    ValueError: no such column; the file is damaged.
    ImportError: pyarrow is not installed.
  """
  pyarrow = columns.arrow()
  with _opened(span.path) as reader:
    try:
      for batch in _batches(reader, span):
        yield from columns.records(batch, field, span.path)
    except (pyarrow.ArrowInvalid, OSError) as error:
      raise ValueError(
        f"{span.path} is damaged ({error}); get it again"
      ) from error


def _batches(reader: Any, span: base.Span) -> Iterator[Any]:
  if not hasattr(reader, "num_record_batches"):
    yield from reader
    return
  stop = reader.num_record_batches if span.stop is None else span.stop
  for i in range(span.start, stop):
    yield reader.get_batch(i)


def _opened(path: str) -> contextlib.AbstractContextManager:
  return columns.reading(path, "an Arrow", _reader)


def _reader(source: Any) -> Any:
  pyarrow = columns.arrow()
  magic = source.read(len(_MAGIC))
  source.seek(0)
  if magic == _MAGIC:
    return pyarrow.ipc.open_file(source)
  return pyarrow.ipc.open_stream(source)

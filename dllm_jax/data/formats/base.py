"""The nouns that readers share, and how a record's field becomes texts."""

from collections.abc import Iterable, Iterator
import dataclasses
from typing import Any, Protocol

LEGAL = (
  "text (.txt), JSON (.jsonl, .json), each also .gz, .bz2, .xz or .zst; Parquet, "
  "Arrow, MDS; tokens (.bin, .npy)"
)


@dataclasses.dataclass(frozen=True)
class Span:
  """A piece of a file, read on its own.

  Attributes:
    path: the file.
    start: where documents of this piece may begin: a byte, a Parquet row group,
      an Arrow batch or an MDS sample.
    stop: where the next piece starts, or None for the end of the file.
  """

  path: str
  start: int = 0
  stop: int | None = None


@dataclasses.dataclass(frozen=True)
class Document:
  """A text, the file it is from, and whether it is all of a text file."""

  text: str
  path: str
  running: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
  """How documents lie in files.

  Attributes:
    text_field: the field (JSON, MDS) or column (Parquet, Arrow) that holds the
      text; `a.b` is field b of a, and each element of a list is a document.
    document_separator: what stands between documents of a text file; None: a
      text file is one running text.
  """

  text_field: str = "text"
  document_separator: str | None = None

  def __post_init__(self):
    if self.document_separator == "":
      raise ValueError(
        "document_separator is empty; give the text that stands between "
        "documents, or None for one document a file"
      )


class Reader(Protocol):
  """One form of corpus.

  What holds text alone has, instead of `records`, `read(span, form)`, which
  yields documents.
  """

  def spans(self, path: str, form: Format, span_bytes: int) -> list[Span]:
    """Returns the pieces of a file, each of about `span_bytes` bytes."""

  def records(self, span: Span, field: str | None) -> Iterator[tuple[str, Any]]:
    """Yields (what it is called in messages, record) of what begins in a piece.

    A record is what JSON holds, of the column alone that has the field, or,
    without one, of all columns that can be read.
    """


def documents(
  records: Iterable[tuple[str, Any]], form: Format, path: str
) -> Iterator[Document]:
  """Yields the documents in records; those without text too."""
  for where, record in records:
    for text in texts(record, form.text_field, where):
      yield Document(text, path)


def decoded(data: bytes, path: str, at: int) -> str:
  """Returns the text of bytes that stand at byte `at` of a file.

  Raises:
    ValueError: they are not UTF-8.
  """
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{path} is not UTF-8 text (byte {at + error.start}); convert it, or "
      f"give {LEGAL}"
    ) from error


def texts(record: Any, field: str, where: str) -> list[str]:
  """Returns the texts in a field of a record; null is a text without letters.

  Args:
    record: what JSON holds: dictionaries, lists, texts.
    field: a name, or a path of names joined by dots. A list on the way, or at
      the end, gives a text for each of its elements.
    where: what the record is called in messages.

  Raises:
    ValueError: there is no such field, or it holds something else.
  """
  if isinstance(record, list):
    return [t for r in record for t in texts(r, field, where)] or [""]
  if record is None:
    return [""]
  if isinstance(record, dict):
    if field in record:
      return _leaf(record[field], field, where)
    head, _, rest = field.partition(".")
    if rest and head in record:
      return texts(record[head], rest, where)
  known = ", ".join(record) if isinstance(record, dict) else "none"
  raise ValueError(
    f"{where} has no text in field {field!r}; its fields are: {known}; set "
    "text_field"
  )


def _leaf(value: Any, field: str, where: str) -> list[str]:
  if isinstance(value, str):
    return [value]
  if value is None:
    return [""]
  if isinstance(value, list) and all(isinstance(v, str) for v in value):
    return value or [""]
  inner = "; a.b is field b of a" if isinstance(value, (dict, list)) else ""
  raise ValueError(
    f"{where}: {field!r} holds {type(value).__name__}, not text; set text_field"
    + inner
  )

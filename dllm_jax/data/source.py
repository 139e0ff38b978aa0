"""Documents from files: text, JSONL and Parquet, plain or compressed.

Whoever reads a corpus names it by a path; `find` turns that into files, `spans`
cuts the files into pieces that can be read independently of each other, and
`read` yields a piece's documents. Only the standard library here, so that
tokenising processes start fast; pyarrow is imported when a Parquet file is met.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import glob
import gzip
import hashlib
import importlib.resources
import json
import lzma
import pathlib
import zlib

from dllm_jax.core import paths

_TEXT = (".txt", ".text", ".md")
_JSONL = (".jsonl", ".ndjson")
_PARQUET = (".parquet",)
_COMPRESSED = {".gz": gzip.open, ".xz": lzma.open}
_LEGAL = "text (.txt), JSONL (.jsonl) or Parquet, the first two also .gz or .xz"
_BLOCK_BYTES = 2**22
# Reading past what a compressed file holds, or something else in its place.
_DAMAGED = (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error)


@dataclasses.dataclass(frozen=True)
class Span:
  """A piece of a file, read on its own.

  Attributes:
    path: the file.
    start: where documents of this piece may begin: a byte, or a Parquet row
      group.
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
    text_field: the field (JSONL) or column (Parquet) that holds the text.
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


def corpora() -> dict[str, pathlib.Path]:
  """Returns the texts that come with the package, by name."""
  folder = pathlib.Path(str(importlib.resources.files("dllm_jax.data")))
  return {p.stem: p for p in sorted((folder / "corpora").glob("*.txt"))}


def find(path: str) -> list[str]:
  """Returns the files that a path stands for, in a fixed order.

  Args:
    path: the name of a bundled text, a file, a directory (searched to the
      bottom) or a glob of files and directories.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: there are files, but none of a known kind.
  """
  bundled = corpora()
  if path in bundled:
    return [str(bundled[path])]
  at = paths.local(path)
  named = [at] if at.exists() else []
  if not named:
    # Unlike Path.glob, takes absolute patterns.
    found = glob.glob(str(at), recursive=True)  # noqa: PTH207
    named = sorted(map(pathlib.Path, found))
  if not named:
    raise FileNotFoundError(
      f"data path {path!r} does not exist; give a file, a directory, a glob, "
      f"or a bundled text ({', '.join(bundled)})"
    )
  files = []
  for entry in named:
    if entry.is_file():
      files.append(entry)
    else:
      files += sorted(p for p in entry.rglob("*") if _is_data(p, entry))
  if not files:
    raise ValueError(
      f"no data in {path!r}; legal are {_LEGAL}, or a directory that dllm "
      "prepare made"
    )
  return list(dict.fromkeys(map(str, files)))


def _suffixes(path: pathlib.Path | str) -> tuple[str, str]:
  """Returns the suffix of the content and that of the compression."""
  path = pathlib.Path(path)
  compression = path.suffix if path.suffix in _COMPRESSED else ""
  inner = path.with_suffix("") if compression else path
  return inner.suffix, compression


def _is_data(path: pathlib.Path, root: pathlib.Path) -> bool:
  hidden = any(p.startswith(".") for p in path.relative_to(root).parts)
  known = _suffixes(path)[0] in _TEXT + _JSONL + _PARQUET
  return known and not hidden and path.is_file()


def size(files: Sequence[str]) -> int:
  """Returns the bytes of files on disk."""
  return sum(pathlib.Path(f).stat().st_size for f in files)


def spans(files: Sequence[str], form: Format, span_bytes: int) -> list[Span]:
  """Returns the pieces of files, each of about `span_bytes` bytes.

  Files that cannot be entered midway (compressed, running text) are one piece.
  A function of the files alone: nothing depends on who reads.
  """
  pieces = []
  for path in files:
    kind, compression = _suffixes(path)
    if kind in _PARQUET:
      with _parquet(path) as file:
        pieces += [Span(path, g, g + 1) for g in range(file.num_row_groups)]
      continue
    delimiter = _delimiter(path, form)
    if compression or not delimiter or _overlaps(delimiter):
      pieces.append(Span(path))
      continue
    cuts = [*range(0, size([path]), span_bytes), None]
    pieces += [Span(path, *c) for c in zip(cuts[:-1], cuts[1:], strict=True)]
  return pieces


def _delimiter(path: str, form: Format) -> bytes | None:
  """Returns what ends a document of a file, or None for running text."""
  if _suffixes(path)[0] in _JSONL:
    return b"\n"
  separator = form.document_separator
  return None if separator is None else separator.encode()


def _overlaps(delimiter: bytes) -> bool:
  """Whether two occurrences may overlap, so that midway entry is ambiguous."""
  return any(delimiter[:n] == delimiter[-n:] for n in range(1, len(delimiter)))


def read(span: Span, form: Format) -> Iterator[Document]:
  """Yields the documents that begin in a piece; empty ones too.

  Raises:
    ValueError: not UTF-8, not JSON, no such field, a damaged archive; the
      message names the file.
    ImportError: a Parquet file without pyarrow.
  """
  kind, compression = _suffixes(span.path)
  if kind in _PARQUET:
    yield from _read_parquet(span, form)
    return
  delimiter = _delimiter(span.path, form)
  try:
    with _COMPRESSED.get(compression, open)(span.path, "rb") as file:
      if delimiter is None:
        yield Document(_text(file.read(), span.path, 0), span.path, True)
        return
      for at, record in _records(file, delimiter, span):
        if kind not in _JSONL:
          yield Document(_text(record, span.path, at), span.path)
        elif record.strip():
          yield Document(_json_text(record, span.path, at, form), span.path)
  except _DAMAGED as error:
    raise ValueError(
      f"{span.path} is damaged ({error}); it does not decompress, get it again"
    ) from error


def _records(file, delimiter: bytes, span: Span) -> Iterator[tuple[int, bytes]]:
  """Yields (offset, bytes) of the records that begin in a piece.

  A piece that starts midway looks one delimiter back: a record that begins
  exactly at its start is its own.
  """
  at = max(span.start - len(delimiter), 0)
  skip = span.start > 0
  if skip:
    file.seek(at)
  rest = b""
  for block in iter(lambda: file.read(_BLOCK_BYTES), b""):
    *records, rest = (rest + block).split(delimiter)
    for record in records:
      if not skip:
        if span.stop is not None and at >= span.stop:
          return
        yield at, record
      skip = False
      at += len(record) + len(delimiter)
  if rest and not skip and (span.stop is None or at < span.stop):
    yield at, rest


def _text(data: bytes, path: str, at: int) -> str:
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{path} is not UTF-8 text (byte {at + error.start}); convert it, or "
      f"give {_LEGAL}"
    ) from error


def _json_text(record: bytes, path: str, at: int, form: Format) -> str:
  try:
    fields = json.loads(_text(record, path, at))
  except json.JSONDecodeError as error:
    raise ValueError(
      f"{path} is not JSONL: the line at byte {at} is not JSON "
      f"({error.msg}); write one JSON object a line"
    ) from error
  value = fields.get(form.text_field) if isinstance(fields, dict) else None
  if not isinstance(value, str):
    known = ", ".join(fields) if isinstance(fields, dict) else "none"
    raise ValueError(
      f"{path}: the line at byte {at} has no text in field "
      f"{form.text_field!r}; its fields are: {known}; set text_field"
    )
  return value


def _parquet(path: str):
  try:
    import pyarrow.parquet  # noqa: PLC0415  An extra: only Parquet needs it.
  except ImportError as error:
    raise ImportError(
      f"{path} is Parquet, which needs pyarrow: pip install pyarrow"
    ) from error
  try:
    return pyarrow.parquet.ParquetFile(path)
  except pyarrow.ArrowInvalid as error:
    raise ValueError(
      f"{path} is not a Parquet file; legal files are {_LEGAL}"
    ) from error


def _read_parquet(span: Span, form: Format) -> Iterator[Document]:
  with _parquet(span.path) as file:
    names = file.schema_arrow.names
    if form.text_field not in names:
      raise ValueError(
        f"{span.path} has no column {form.text_field!r}; its columns are: "
        f"{', '.join(names)}; set text_field"
      )
    groups = range(span.start, span.stop or file.num_row_groups)
    batches = file.iter_batches(
      row_groups=list(groups), columns=[form.text_field]
    )
    for batch in batches:
      for value in batch.column(0).to_pylist():
        if value is not None and not isinstance(value, str):
          raise ValueError(
            f"{span.path}: column {form.text_field!r} holds "
            f"{type(value).__name__}, not text; set text_field"
          )
        yield Document(value or "", span.path)


def documents(files: Sequence[str], form: Format) -> Iterator[Document]:
  """Yields all documents of files, in order."""
  for span in spans(files, form, 2**25):
    yield from read(span, form)


def empty(path: str) -> ValueError:
  """Returns the error of a path without text."""
  return ValueError(f"{path} is empty; give a file with text in it")


def split(document: Document, held_out: float) -> tuple[str, str]:
  """Returns the parts of a document for training and for evaluation.

  The tail of a running text is held out; any other document goes to one side as
  a whole, by a hash of its text, so that copies of it never lie on both.

  Args:
    document: the document.
    held_out: the fraction to hold out.
  """
  text = document.text
  if document.running:
    cut = int(len(text) * (1 - held_out))
    return text[:cut], text[cut:]
  digest = hashlib.blake2b(
    text.encode(errors="surrogatepass"), digest_size=8
  ).digest()
  if int.from_bytes(digest) < held_out * 2**64:
    return "", text
  return text, ""


def training_texts(
  files: Sequence[str], form: Format, held_out: float
) -> Iterator[str]:
  """Yields what of files is for training, see `split`."""
  for document in documents(files, form):
    yield split(document, held_out)[0]

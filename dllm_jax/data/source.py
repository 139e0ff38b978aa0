"""Documents from files, whatever their form: which reader a file has.

Whoever reads a corpus names it by a path; `find` turns that into files, `spans`
cuts the files into pieces that can be read independently of each other, and
`read` yields a piece's documents. The forms themselves are in `formats`.
"""

from collections.abc import Iterator, Sequence
import concurrent.futures
import glob
import hashlib
import importlib.resources
import os
from typing import Any

from dllm_jax.core import paths
from dllm_jax.data.formats import (
  arrow,
  base,
  compressed,
  folder,
  json_text,
  mds,
  parquet,
  text,
)
from dllm_jax.data.formats.base import Document, Format, LEGAL, Reader, Span

__all__ = ["Document", "Format", "Span"]

_READERS: dict[str, Reader] = {
  ".json": json_text,
  ".jsonl": json_text,
  ".ndjson": json_text,
  ".parquet": parquet,
  ".arrow": arrow,
  ".feather": arrow,
  ".mds": mds,
} | dict.fromkeys(folder.TEXT, text)
_REQUESTS = 32  # At a time, where each answer comes from far away.


def corpora() -> dict[str, str]:
  """Returns the files of the texts that come with the package, by name."""
  at = str(importlib.resources.files("dllm_jax.data"))
  files = sorted((paths.place(at) / "corpora").glob("*.txt"))
  return {p.stem: os.fspath(p) for p in files}


def find(path: str) -> list[str]:
  """Returns the files that a path stands for, in a fixed order.

  Args:
    path: the name of a bundled text, a file, a directory (see `folder.chosen`)
      or a glob of files and directories, here or in a bucket; of Megatron's
      token files, also what both names begin with.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: there are files, but none of a known kind, or it is not clear
      which of them to read.
  """
  bundled = corpora()
  if path in bundled:
    return [bundled[path]]
  named = _named(path)
  if not named:
    raise FileNotFoundError(
      f"data path {path!r} does not exist; give a file, a directory, a glob, "
      f"or a bundled text ({', '.join(bundled)})"
    )
  files = []
  for entry in named:
    if entry.is_dir():
      files += folder.chosen(entry)
    else:
      files.append(_file(os.fspath(entry)))
  if not files:
    raise ValueError(
      f"no data in {path!r}; legal are {LEGAL}, or a directory that dllm "
      "prepare made"
    )
  return list(dict.fromkeys(files))


def _named(path: str) -> list[paths.Path]:
  """Returns the files and directories that a path or a glob names."""
  at = paths.place(path)
  if at.exists():
    return [at]
  name = os.fspath(at)
  if paths.place(f"{name}.idx").exists():
    return [paths.place(f"{name}.bin")]
  if paths.in_bucket(at):
    system = paths.file_system(at)
    found = [system.unstrip_protocol(p) for p in system.glob(name)]
  else:
    found = glob.glob(name, recursive=True)  # noqa: PTH207  Absolute ones too.
  return [paths.place(f) for f in sorted(found)]


def _file(path: str) -> str:
  """Returns a named file, if it is of a kind that is read.

  Raises:
    ValueError: it is not. It may be a table or a program as well as a text.
  """
  if path.endswith(".idx"):
    return path.removesuffix(".idx") + ".bin"
  kind = compressed.suffixes(path)[0]
  if kind and kind not in _READERS and kind not in folder.TOKENS:
    raise ValueError(
      f"{path}: files named {kind} are not read; legal are {LEGAL}; a running "
      "text ends in .txt"
    )
  return path


def are_tokens(files: Sequence[str]) -> bool:
  """Whether files hold token ids rather than text.

  Raises:
    ValueError: some do.
  """
  ids = [f for f in files if f.endswith(folder.TOKENS)]
  if ids and len(ids) < len(files):
    raise ValueError(
      f"{ids[0]} holds token ids and {sorted({*files} - {*ids})[0]} text; name "
      "one kind, or both as parts of a mixture"
    )
  return bool(ids)


def running(path: str, form: Format) -> bool:
  """Whether a file is one running text."""
  return _reader(path) is text and form.document_separator is None


def size(files: Sequence[str]) -> int:
  """Returns the bytes of files where they lie."""
  length = lambda path: paths.place(path).stat().length
  if not any(map(paths.in_bucket, files)):
    return sum(map(length, files))
  with concurrent.futures.ThreadPoolExecutor(_REQUESTS) as pool:
    return sum(pool.map(length, files))


def spans(files: Sequence[str], form: Format, span_bytes: int) -> list[Span]:
  """Returns the pieces of files, each of about `span_bytes` bytes.

  Files that cannot be entered midway (compressed, running text) are one piece.
  A function of the files alone: nothing depends on who reads.

  Raises:
    ValueError: a file is not what its name says, or damaged.
    ImportError: what reads it is not installed.
  """
  return [
    span
    for path in files
    for span in _reader(path).spans(path, form, span_bytes)
  ]


def read(span: Span, form: Format) -> Iterator[Document]:
  """Yields the documents that begin in a piece; empty ones too.

  Raises:
    ValueError: not UTF-8, not JSON, no such field, a damaged archive; the
      message names the file.
    ImportError: what reads it is not installed.
  """
  reader = _reader(span.path)
  if reader is text:
    return text.read(span, form)
  return base.documents(reader.records(span, form.text_field), form, span.path)


def records(path: str) -> Iterator[Any]:
  """Yields the records of a file, whole; none of a file of text.

  Raises:
    ValueError: not UTF-8, not JSON, a damaged archive; the message names the
      file.
    ImportError: what reads it is not installed.
  """
  reader = _reader(path)
  if reader is not text:
    for span in reader.spans(path, Format(), 2**25):
      yield from (record for _, record in reader.records(span, None))


def _reader(path: str) -> Reader:
  """Returns the reader of a file, by its name, and its content without one."""
  kind = compressed.suffixes(path)[0]
  if kind in folder.TOKENS:
    raise ValueError(
      f"{path} holds token ids, not text; dllm train reads it as it is"
    )
  if not kind and json_text.layout(path) != "text":
    return json_text
  return _READERS.get(kind, text)


def documents(files: Sequence[str], form: Format) -> Iterator[Document]:
  """Yields all documents of files, in order."""
  for path in files:
    for span in spans([path], form, 2**25):
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
  return ("", text) if is_held_out(text, held_out) else (text, "")


def is_held_out(text: str, held_out: float) -> bool:
  """Returns whether a document is among the fraction that is held out."""
  digest = hashlib.blake2b(
    text.encode(errors="surrogatepass"), digest_size=8
  ).digest()
  return int.from_bytes(digest) < held_out * 2**64


def training_texts(
  files: Sequence[str], form: Format, held_out: float
) -> Iterator[str]:
  """Yields what of files is for training, see `split`."""
  for document in documents(files, form):
    yield split(document, held_out)[0]

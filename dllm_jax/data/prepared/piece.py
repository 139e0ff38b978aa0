"""One piece of a plan: its documents as token records, or as hashes.

Documents go through in batches: a batch is tokenised by one call, and its rows
are written before the next is read, so that memory does not grow with a piece.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
import contextlib
import dataclasses
import errno
import hashlib

import numpy as np

from dllm_jax.data import packing as packing_lib
from dllm_jax.data import source
from dllm_jax.data.prepared.encoder import Encoder
from dllm_jax.data.prepared.progress import DOCUMENTS, Progress, SIDES

HASH_BYTES = 16
_BATCH_CHARACTERS = 2**18
_BATCH_DOCUMENTS = 256
# A record a group: rows are read alone, in any order. Higher levels of zstd
# take twice the time for 1 % of the bytes.
_OPTIONS = "group_size:1,zstd:1"


def hash_documents(progress: Progress, piece: int) -> None:
  """Keeps a hash of each document's text."""
  plan = progress.plan
  texts = (d.text for d in plan.pieces[piece].documents(plan.form))
  hashes = (
    hashlib.blake2b(
      text.encode(errors="surrogatepass"), digest_size=HASH_BYTES
    ).digest()
    for text in texts
  )
  progress.record_hashes(piece, b"".join(hashes))


def tokenise(
  progress: Progress,
  encode: Encoder,
  piece: int,
  repeated: Collection[int] = (),
) -> None:
  """Writes the records of a piece, and then that it is done.

  Args:
    progress: the directory.
    encode: the plan's tokenizer.
    piece: which one.
    repeated: documents that are left out, by their number in the piece.
  """
  plan = progress.plan
  counts = dict.fromkeys(DOCUMENTS, 0)
  sizes = {side: packing_lib.TextSize() for side in SIDES}
  documents = _kept(plan.pieces[piece].documents(plan.form), repeated, counts)
  with contextlib.ExitStack() as stack:
    writers = {
      side: stack.enter_context(Writer(progress, progress.name(side, piece)))
      for side in SIDES
    }
    for batch in _batches(documents):
      parts = [source.split(d, plan.held_out) for d in batch]
      for i, side in enumerate(SIDES):
        texts = [
          source.Document(part[i], d.path)
          for part, d in zip(parts, batch, strict=True)
          if part[i]
        ]
        ids = encode(texts)
        sizes[side] += _size([d.text for d in texts], ids)
        writers[side].write(ids)
    for side in SIDES:
      records = writers[side].close()
      counts[side] = {
        "files": [progress.name(side, piece)] if records else [],
        "records": records,
        **dataclasses.asdict(sizes[side]),
      }
  progress.record(piece, counts)


def _kept(
  documents: Iterable[source.Document],
  repeated: Collection[int],
  counts: dict[str, int],
) -> Iterator[source.Document]:
  """Yields documents with text that are no repetition, and counts them all."""
  repeated = frozenset(repeated)
  for i, document in enumerate(documents):
    if not document.text or document.text.isspace():
      counts["empty_documents"] += 1
    elif i in repeated:
      counts["duplicate_documents"] += 1
    else:
      counts["documents"] += 1
      yield document


def _batches(
  documents: Iterable[source.Document],
) -> Iterator[list[source.Document]]:
  batch, characters = [], 0
  for document in documents:
    batch.append(document)
    characters += len(document.text)
    if characters >= _BATCH_CHARACTERS or len(batch) >= _BATCH_DOCUMENTS:
      yield batch
      batch, characters = [], 0
  if batch:
    yield batch


def _size(
  texts: Sequence[str], ids: Sequence[np.ndarray]
) -> packing_lib.TextSize:
  return packing_lib.TextSize(
    sum(map(len, ids)),
    sum(map(len, texts)),
    sum(
      len(t) if t.isascii() else len(t.encode(errors="surrogatepass"))
      for t in texts
    ),
  )


class Packer:
  """Rows of documents that come a few at a time: those of `packing.Rows`.

  Args:
    length: tokens a row.
    packing: whether documents are segments of their own.
  """

  def __init__(self, length: int, packing: packing_lib.Packing):
    self._length, self._apart = length, packing == "packed"
    self._tokens = self._segments = np.zeros((0,), np.int32)

  def add(self, documents: Sequence[np.ndarray]) -> packing_lib.Row:
    """Returns the rows `[n, length]` that are full, and their segment ids."""
    documents = [d for d in documents if len(d)]
    numbers = np.arange(len(documents) if self._apart else 0, dtype=np.int32)
    last = self._segments[-1] if len(self._segments) else np.int32(0)
    lengths = [len(d) for d in documents]
    new = (
      np.repeat(last + 1 + numbers, lengths)
      if self._apart
      else np.ones(sum(lengths), np.int32)
    )
    tokens = np.concatenate([self._tokens, *documents])
    segments = np.concatenate([self._segments, new])
    full = len(tokens) - len(tokens) % self._length
    self._tokens = tokens[full:].copy()
    self._segments = packing_lib.renumber(segments[full:])
    rows = tokens[:full].reshape(-1, self._length)
    marks = segments[:full].reshape(-1, self._length)
    return rows, marks - marks[:, :1] + 1

  def rest(self) -> packing_lib.Row:
    """Returns the row that is not full, `[0 or 1, length]`, with its padding."""
    if not len(self._tokens):
      return np.zeros((2, 0, self._length), np.int32)
    row = packing_lib.pad(self._tokens, self._segments, self._length)
    return row[0][None], row[1][None]


class Writer:
  """Records of one side of a piece; the file appears when it is closed.

  Args:
    progress: where it is.
    name: the name of the file.
  """

  def __init__(self, progress: Progress, name: str):
    self._progress, self._name = progress, name
    plan = progress.plan
    self._types = plan.token_type, plan.segment_type
    self._pack = Packer(plan.length, plan.packing)
    self._records = 0
    self._file = self._stack = None

  def __enter__(self) -> "Writer":
    self._stack = contextlib.ExitStack()
    return self

  def __exit__(self, *error) -> None:
    self._stack.close()

  def write(self, documents: Sequence[np.ndarray]) -> None:
    """Adds tokenised documents."""
    self._write(self._pack.add(documents))

  def close(self) -> int:
    """Puts the file into its place, and returns the number of its records.

    Raises:
      OSError: not all records were written.
    """
    from array_record.python import array_record_module  # noqa: PLC0415

    self._write(self._pack.rest())
    if not self._records:
      return 0
    with _no_space(self._name):
      self._file.close()
      reader = array_record_module.ArrayRecordReader(self._temporary)
    written = reader.num_records()
    reader.close()
    if written != self._records:
      raise OSError(
        errno.EIO,
        f"{written} of {self._records} records were written",
        self._name,
      )
    self._progress.publish(self._temporary, self._name)
    return written

  def _write(self, rows: packing_lib.Row) -> None:
    if not len(rows[0]):
      return
    raw = np.concatenate(
      [
        np.ascontiguousarray(part, dtype=kind).view(np.uint8)
        for part, kind in zip(rows, self._types, strict=True)
      ],
      axis=1,
    )
    with _no_space(self._name):
      self._open()
      for row in raw:
        self._file.write(row.tobytes())
    self._records += len(raw)

  def _open(self) -> None:
    from array_record.python import array_record_module  # noqa: PLC0415

    if self._file is None:
      self._temporary = self._stack.enter_context(self._progress.aside())
      self._file = array_record_module.ArrayRecordWriter(
        self._temporary, _OPTIONS
      )


@contextlib.contextmanager
def _no_space(name: str) -> Iterator[None]:
  """Makes the error of a full disk that of the operating system."""
  try:
    yield
  except RuntimeError as error:
    if "No space left" not in str(error):
      raise
    raise OSError(
      errno.ENOSPC, "the disk is full; make room and run again", name
    ) from error

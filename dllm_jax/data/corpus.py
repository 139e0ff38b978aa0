"""From what a config names to rows of tokens: the train and held-out sides.

A side is either random access (`Rows` in memory, `Records` on disk) or a
`stream.Stream` of text packed on the fly. What turns rows into batches is in
`batches`.
"""

import dataclasses
from typing import Any, Protocol

import grain
import numpy as np

from dllm_jax.data import packing as packing_lib
from dllm_jax.data import record, source, stream
from dllm_jax.data import tokenizer as tokenizer_lib
from dllm_jax.data.numbers import RandomRows

# Held-out text that is packed on the fly is measured on its beginning only.
_MEASURED_CHARACTERS = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
  """What to train on.

  Attributes:
    path: the name of a bundled text ("shakespeare"); a file, a directory or a
      glob of text, JSONL or Parquet files; a directory that `prepare` made; or
      "random" for random tokens, to measure speed.
    tokenizer: "char", "byte", "bpe:N" for N tokens of byte pairs learned from
      the training text, the mask included, or the path of a tokenizer.json;
      None: that of prepared data, "char" for text. "numbers:N" for N ids of
      random tokens.
    mask_token: the mask among the tokens of a tokenizer.json; None: a new id.
    length: tokens a row.
    packing: "slices" cuts everything as one text; "packed" keeps documents
      apart, several a row. Prepared data has its own.
    held_out: the fraction that is held out; see `source.split`. Prepared data
      has its own.
    held_out_path: text to hold out instead, beside all of `path` in training.
    text_field: the field (JSONL) or column (Parquet) of the text.
    document_separator: what stands between documents of a text file; None: each
      file is one text.
    virtual_shards: into how many streams text packed on the fly is dealt,
      reduced to its largest divisor in common with the batch size. A multiple
      of the number of processes.
    in_memory_bytes: files of "packed" text larger than this in all are packed
      on the fly. "slices" are always held in memory: prepare large corpora.
  """

  path: str = "shakespeare"
  tokenizer: str | None = None
  mask_token: str | None = None
  length: int = 128
  packing: packing_lib.Packing = "slices"
  held_out: float = 0.1
  held_out_path: str | None = None
  text_field: str = "text"
  document_separator: str | None = None
  virtual_shards: int = 64
  in_memory_bytes: int = 2**28

  def __post_init__(self):
    packing_lib.check(self.packing, self.length, self.held_out)
    if self.virtual_shards < 1:
      raise ValueError(
        f"virtual_shards is {self.virtual_shards}; at least one is needed"
      )

  @property
  def held_out_of_path(self) -> float:
    """The fraction of `path` itself that is held out."""
    return 0.0 if self.held_out_path else self.held_out

  @property
  def format(self) -> source.Format:
    """How documents lie in the files."""
    return source.Format(
      text_field=self.text_field, document_separator=self.document_separator
    )


class RandomAccess(Protocol):
  """Rows by index: `Rows` in memory, `Records` of prepared data."""

  def __len__(self) -> int:
    """Returns the number of rows."""

  def __getitem__(self, index: int) -> packing_lib.Row:
    """Returns a row's tokens and segment ids."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """Tokenised text on two sides.

  Attributes:
    tokenizer: how text became tokens.
    length: tokens a row.
    train: what to train on.
    held_out: what to evaluate on, or None.
    held_out_text: the text that held-out tokens stand for, for bits per
      character; of text packed on the fly its first million characters.
  """

  tokenizer: tokenizer_lib.Tokenizer
  length: int
  train: RandomAccess | stream.Stream
  held_out: RandomAccess | stream.Stream | None
  held_out_text: packing_lib.TextSize | None


class Records:
  """Rows of prepared data, read from disk by index.

  Args:
    folder: the prepared directory.
    side: "train" or "held_out".
    manifest: the directory's manifest.
    length: tokens a row, a divisor of a record's.
  """

  def __init__(
    self, folder: str, side: str, manifest: dict[str, Any], length: int
  ):
    counts = manifest[side]
    files = record.files(folder, side, manifest)
    self._manifest = manifest
    self._length = length
    self._slices = manifest["length"] // length
    self._source = grain.sources.ArrayRecordDataSource(files)
    if len(self._source) != counts["records"]:
      raise ValueError(
        f"{folder} has {len(self._source)} {side} records where its manifest "
        f"counts {counts['records']}; remove it and run dllm prepare again"
      )
    # Only the last record of a file is padded: rows of padding alone, at its
    # end, are left out.
    tokens = np.asarray(counts["file_tokens"])
    self._rows = np.cumsum(-(-tokens // length))
    records = -(-tokens // manifest["length"])
    self._first_record = np.cumsum(records) - records

  def __len__(self) -> int:
    return int(self._rows[-1])

  def __getitem__(self, index: int) -> packing_lib.Row:
    file = int(np.searchsorted(self._rows, index, side="right"))
    inside = index - (self._rows[file - 1] if file else 0)
    at, part = divmod(int(inside), self._slices)
    tokens, segments = record.decode(
      self._source[int(self._first_record[file]) + at], self._manifest
    )
    cut = slice(part * self._length, (part + 1) * self._length)
    tokens, segments = tokens[cut], segments[cut]
    real = segments > 0
    segments[real] = packing_lib.renumber(segments[real])
    return tokens, segments


def load(
  dataset: Dataset, *, tokenizer: tokenizer_lib.Tokenizer | None = None
) -> Corpus:
  """Returns the tokenised text that a dataset names.

  Args:
    dataset: what to read.
    tokenizer: a tokenizer to use as it is, such as that of an earlier run;
      None: made as `dataset` says.

  Raises:
    FileNotFoundError: a path does not exist.
    ValueError: text that is empty, not UTF-8 or otherwise not legal, or
      settings that contradict prepared data.
    ImportError: Parquet without pyarrow.
  """
  if dataset.path == "random":
    return _load_random(dataset, tokenizer)
  if record.is_prepared(dataset.path):
    return _load_prepared(dataset, tokenizer)
  files = source.find(dataset.path)
  if tokenizer is None:
    tokenizer = tokenizer_lib.make_tokenizer(
      dataset.tokenizer or "char",
      (d.text for d in source.documents(files, dataset.format)),
      training_texts=source.training_texts(
        files, dataset.format, dataset.held_out_of_path
      ),
      mask_token=dataset.mask_token,
      path=dataset.path,
    )
  if (
    dataset.packing == "packed" and source.size(files) > dataset.in_memory_bytes
  ):
    return _load_stream(dataset, files, tokenizer)
  return _load_memory(dataset, files, tokenizer)


def _load_random(
  dataset: Dataset, tokenizer: tokenizer_lib.Tokenizer | None
) -> Corpus:
  if not (dataset.tokenizer or "").startswith("numbers:"):
    raise ValueError(
      "data.path random has tokens without text: set data.tokenizer to "
      "numbers:N, for N ids, the mask included"
    )
  tokenizer = tokenizer or tokenizer_lib.make_tokenizer(dataset.tokenizer, [])
  return Corpus(
    tokenizer=tokenizer,
    length=dataset.length,
    train=RandomRows(tokens=tokenizer.mask_id, length=dataset.length),
    held_out=None,
    held_out_text=None,
  )


def _load_memory(
  dataset: Dataset, files: list[str], tokenizer: tokenizer_lib.Tokenizer
) -> Corpus:
  fraction = dataset.held_out_of_path
  count = packing_lib.Counter(tokenizer, fraction)
  sides = [], []
  for document in source.documents(files, dataset.format):
    for side, ids in zip(sides, count(document), strict=True):
      if ids is not None:
        side.append(ids)
  if not count.documents:
    raise source.empty(dataset.path)
  if not sides[0]:
    raise ValueError(
      f"{dataset.path}: nothing is left to train on ({count.documents} "
      f"documents, held_out {fraction}); lower held_out or give held_out_path"
    )
  train, held_out = (
    packing_lib.Rows(side, length=dataset.length, packing=dataset.packing)
    for side in sides
  )
  size = count.held_out
  if dataset.held_out_path:
    held_out, size = _load_held_out(dataset, tokenizer)
  elif fraction and not len(held_out):
    raise _nothing_held_out(dataset)
  return Corpus(
    tokenizer=tokenizer,
    length=dataset.length,
    train=train,
    held_out=held_out if len(held_out) else None,
    held_out_text=size if size.tokens else None,
  )


def _nothing_held_out(dataset: Dataset) -> ValueError:
  return ValueError(
    f"{dataset.path}: held_out {dataset.held_out} of so few documents is "
    "none; raise it, give held_out_path, or set it to 0 for no evaluation"
  )


def _load_held_out(
  dataset: Dataset, tokenizer: tokenizer_lib.Tokenizer
) -> tuple[packing_lib.Rows, packing_lib.TextSize]:
  """Returns the rows and the size of a held-out text of its own."""
  path = dataset.held_out_path
  count = packing_lib.Counter(tokenizer, 0.0)
  documents = source.documents(source.find(path), dataset.format)
  ids = [count(document)[0] for document in documents]
  ids = [i for i in ids if i is not None]
  if not ids:
    raise source.empty(path)
  rows = packing_lib.Rows(ids, length=dataset.length, packing=dataset.packing)
  return rows, count.train


def _load_prepared(
  dataset: Dataset, tokenizer: tokenizer_lib.Tokenizer | None
) -> Corpus:
  path = dataset.path
  manifest = record.read_manifest(path)
  own = tokenizer_lib.tokenizer_from_json(manifest["tokenizer"])
  name = dataset.tokenizer
  fits = None if name is None else tokenizer_lib.may_be(name, own)
  if tokenizer is None and name is not None and fits is None:
    tokenizer = tokenizer_lib.make_tokenizer(
      name, [], mask_token=dataset.mask_token
    )
  if fits is False or (tokenizer is not None and tokenizer != own):
    raise ValueError(
      f"{path} was prepared with another tokenizer; set tokenizer to None "
      "for its own, or prepare the text again"
    )
  if manifest["length"] % dataset.length:
    raise ValueError(
      f"{path} has records of {manifest['length']} tokens, which length "
      f"{dataset.length} does not divide; choose a divisor or prepare again"
    )
  if not manifest["train"]["records"]:
    raise ValueError(f"{path} has no training records; prepare more text")
  train = Records(path, "train", manifest, dataset.length)
  held_out = size = None
  if dataset.held_out_path:
    held_out, size = _load_held_out(dataset, own)
  elif manifest["held_out"]["records"]:
    held_out = Records(path, "held_out", manifest, dataset.length)
    fields = (f.name for f in dataclasses.fields(packing_lib.TextSize))
    size = packing_lib.TextSize(**{f: manifest["held_out"][f] for f in fields})
  return Corpus(
    tokenizer=own,
    length=dataset.length,
    train=train,
    held_out=held_out,
    held_out_text=size,
  )


def _load_stream(
  dataset: Dataset, files: list[str], tokenizer: tokenizer_lib.Tokenizer
) -> Corpus:
  fraction = dataset.held_out_of_path
  train = stream.Stream(
    path=dataset.path,
    files=tuple(files),
    form=dataset.format,
    tokenizer=tokenizer,
    length=dataset.length,
    held_out=fraction,
    virtual_shards=dataset.virtual_shards,
  )
  held_out = size = None
  if dataset.held_out_path:
    held_out, size = _load_held_out(dataset, tokenizer)
  elif fraction:
    held_out = dataclasses.replace(train, side="held_out")
    size = _measure(held_out)
    if not size.tokens:
      raise _nothing_held_out(dataset)
  return Corpus(
    tokenizer=tokenizer,
    length=dataset.length,
    train=train,
    held_out=held_out,
    held_out_text=size,
  )


def _measure(held_out: stream.Stream) -> packing_lib.TextSize:
  """Returns the size of the beginning of held-out text."""
  size = packing_lib.TextSize()
  for document in source.documents(held_out.files, held_out.form):
    text = source.split(document, held_out.held_out)[1]
    if text.strip():
      ids = packing_lib.tokenise(text, document.path, held_out.tokenizer)
      size += packing_lib.text_size(text, ids)
      if size.characters >= _MEASURED_CHARACTERS:
        break
  return size

"""From what a config names to rows of tokens: the train and held-out sides.

A side is random access (`Rows` in memory, `Records` and `TokenRows` on disk), a
`Stream` of text packed on the fly, or a `Mixture` of those. What turns rows into
batches is in `batches`.
"""

from collections.abc import Sequence
import dataclasses
import itertools
from typing import Protocol

from dllm_jax.data import byte_pairs, conversations, record, source
from dllm_jax.data import packing as packing_lib
from dllm_jax.data import tokenizer as tokenizer_lib
from dllm_jax.data.dataset import Dataset
from dllm_jax.data.formats import tokens as tokens_lib
from dllm_jax.data.formats.prepared import Records
from dllm_jax.data.images import ImageTokenizer, load_images, load_pixels
from dllm_jax.data.streams import Mixture, Stream
from dllm_jax.objectives.texts import Fill

_NO_FILL = Fill()


class RandomAccess(Protocol):
  """Rows by index."""

  def __len__(self) -> int:
    """Returns the number of rows."""

  def __getitem__(self, index: int) -> packing_lib.Row:
    """Returns a row."""


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
    texts_apart: see `core.types.Batch`.
    held_out_fill: held-out tokens that count, but only fill rows of
      conversations: no part of `held_out_text`.
    reports: what there is to say of conversations.
    prompts: token ids to be answered while training, and how many tokens each
      answer has room for.
  """

  tokenizer: tokenizer_lib.Tokenizer
  length: int
  train: RandomAccess | Stream | Mixture
  held_out: RandomAccess | Stream | Mixture | None
  held_out_text: packing_lib.TextSize | None
  texts_apart: bool = False
  held_out_fill: int = 0
  reports: tuple[conversations.Report, ...] = ()
  prompts: tuple[tuple[tuple[int, ...], int], ...] = ()

  @property
  def text_share(self) -> float:
    """The share of counted held-out tokens that are text, not fill."""
    if not self.held_out_fill:
      return 1.0
    tokens = self.held_out_text.tokens
    return tokens / (tokens + self.held_out_fill)


def load(
  dataset: Dataset,
  *,
  tokenizer: tokenizer_lib.Tokenizer | None = None,
  fill: Fill = _NO_FILL,
  images: ImageTokenizer | None = None,
) -> Corpus:
  """Returns the tokenised text that a dataset names.

  Args:
    dataset: what to read.
    tokenizer: a tokenizer to use as it is, such as that of an earlier run;
      None: made as `dataset` says.
    fill: what conversations have behind them.
    images: what turns pictures into tokens.

  Raises:
    FileNotFoundError: a path does not exist.
    ValueError: text that is empty or not legal, or settings that contradict
      prepared data.
    ImportError: Parquet without pyarrow.
  """
  if dataset.format == "pixels":
    return Corpus(length=dataset.length, **load_pixels(dataset))
  if dataset.format == "images":
    own = load_images(dataset, tokenizer, images)
    return Corpus(length=dataset.length, **own)
  if dataset.mixture:
    return _load_mixture(dataset, tokenizer, fill)
  if dataset.path == "random":
    return _load_random(dataset, tokenizer)
  if record.is_prepared(dataset.path):
    return _load_prepared(dataset, tokenizer)
  files = source.find(dataset.path)
  form = conversations.recognise(dataset, files)
  tokenizer = _tokenizer(dataset) if tokenizer is None else tokenizer
  if form is not None:
    return _load_conversations(dataset, files, form, tokenizer, fill)
  if source.are_tokens(files):
    return _load_tokens(dataset, files, tokenizer)
  if _too_large(dataset, files):
    return _load_stream(dataset, files, tokenizer)
  return _load_memory(dataset, files, tokenizer)


def _too_large(dataset: Dataset, files: Sequence[str]) -> bool:
  """Whether text is packed on the fly."""
  whole = dataset.packing == "slices" and any(
    source.running(f, dataset.form) for f in files
  )
  return not whole and source.size(files) > dataset.in_memory_bytes


def _tokenizer(dataset: Dataset) -> tokenizer_lib.Tokenizer:
  """Returns the tokenizer that a dataset names, learned from it if need be.

  Raises:
    ValueError: it can be learned only from text that is not there, or from all
      of more text than is read before training.
  """
  name = dataset.tokenizer or "char"
  named = [(part, source.find(part.path)) for part in dataset.parts]
  text = [(part, f) for part, f in named if not source.are_tokens(f)]
  learned = name == "char" or name.startswith("bpe:")
  chats = [p.path for p, f in named if conversations.recognise(p, f)]
  if learned and chats:
    raise ValueError(
      f"{chats[0]} holds conversations, from which no tokenizer is learned: "
      "fine-tune a model that was imported, set data.tokenizer to a "
      "tokenizer.json, or data.format=text to train on a field of text"
    )
  if learned and len(text) < len(named):
    raise ValueError(
      f"{named[0][1][0] if not text else dataset.mixture}: token files do not "
      "name their tokenizer; set data.tokenizer to the tokenizer.json that made "
      "them, to byte, or to numbers:N for N ids without a text"
    )
  large = any(_too_large(part, files) for part, files in text)
  if large and name == "char":
    raise ValueError(
      f"{text[0][0].path}: its characters are known only when all of it has "
      "been read; set data.tokenizer to byte, bpe:N or a tokenizer.json, or run "
      "dllm prepare"
    )
  training = itertools.chain.from_iterable(
    source.training_texts(f, part.form, part.held_out_of_path)
    for part, f in text
  )
  made = tokenizer_lib.make_tokenizer(
    name,
    (d.text for part, f in text for d in source.documents(f, part.form)),
    training_texts=byte_pairs.beginning(training) if large else training,
    mask_token=dataset.mask_token,
    path=" and ".join(part.path for part in dataset.parts),
  )
  return conversations.templated(made, dataset.template)


def _load_mixture(
  dataset: Dataset, tokenizer: tokenizer_lib.Tokenizer | None, fill: Fill
) -> Corpus:
  parts = dataset.parts
  own = [part for part in parts if record.is_prepared(part.path)]
  if tokenizer is None and own:
    tokenizer = _load_prepared(own[0], None).tokenizer
  tokenizer = tokenizer or _tokenizer(dataset)
  loaded = [load(part, tokenizer=tokenizer, fill=fill) for part in parts]
  mixed = lambda sides, weights: Mixture(
    parts=tuple(sides),
    weights=tuple(weights),
    virtual_shards=dataset.virtual_shards,
  )
  weights = [weight for _, weight, *_ in dataset.mixture]
  held_out = [
    (c, w) for c, w in zip(loaded, weights, strict=True) if c.held_out
  ]
  sizes = [c.held_out_text for c, _ in held_out]
  if dataset.held_out_path:
    held_out, sizes = held_out[:1], sizes[:1]  # All have the same.
  return Corpus(
    tokenizer=tokenizer,
    length=dataset.length,
    train=mixed([c.train for c in loaded], weights),
    held_out=mixed([c.held_out for c, _ in held_out], [w for _, w in held_out])
    if held_out
    else None,
    held_out_text=sum(sizes, packing_lib.TextSize())
    if sizes and None not in sizes
    else None,
    texts_apart=any(c.texts_apart for c in loaded),
    held_out_fill=sum(c.held_out_fill for c, _ in held_out),
    reports=tuple(report for c in loaded for report in c.reports),
    prompts=tuple(prompt for c in loaded for prompt in c.prompts)[:3],
  )


def _load_conversations(
  dataset: Dataset,
  files: list[str],
  form: conversations.Form,
  tokenizer: tokenizer_lib.Tokenizer,
  fill: Fill,
) -> Corpus:
  loaded = conversations.load_rows(dataset, files, form, tokenizer, fill)
  if loaded.held_out is None and dataset.held_out_of_path:
    raise _nothing_held_out(dataset)
  return Corpus(tokenizer=tokenizer, length=dataset.length, **loaded._asdict())


def _load_tokens(
  dataset: Dataset, files: list[str], tokenizer: tokenizer_lib.Tokenizer
) -> Corpus:
  opened = [tokens_lib.opened(f) for f in files]
  train, tail = tokens_lib.sides(opened, dataset.held_out_of_path)
  rows = lambda side: tokens_lib.TokenRows(
    side, length=dataset.length, packing=dataset.packing, tokenizer=tokenizer
  )
  held_out, size = rows(tail), None
  if dataset.held_out_path:
    held_out, size = _load_held_out(dataset, tokenizer)
  elif len(held_out):
    size = tokens_lib.measured(tail, tokenizer)
  elif dataset.held_out:
    raise _nothing_held_out(dataset)
  return Corpus(
    tokenizer=tokenizer,
    length=dataset.length,
    train=rows(train),
    held_out=held_out if len(held_out) else None,
    held_out_text=size,
  )


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
    train=packing_lib.RandomRows(
      tokens=tokenizer.mask_id, length=dataset.length
    ),
    held_out=None,
    held_out_text=None,
  )


def _load_memory(
  dataset: Dataset, files: list[str], tokenizer: tokenizer_lib.Tokenizer
) -> Corpus:
  fraction = dataset.held_out_of_path
  count = packing_lib.Counter(tokenizer, fraction)
  sides = [], []
  for document in source.documents(files, dataset.form):
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
) -> tuple[RandomAccess, packing_lib.TextSize]:
  """Returns the rows and the size of a held-out text of its own."""
  path = dataset.held_out_path
  files = source.find(path)
  if source.are_tokens(files):
    side, _ = tokens_lib.sides([tokens_lib.opened(f) for f in files], 0.0)
    rows = tokens_lib.TokenRows(
      side, length=dataset.length, packing=dataset.packing, tokenizer=tokenizer
    )
    return rows, tokens_lib.measured(side, tokenizer)
  count = packing_lib.Counter(tokenizer, 0.0)
  documents = source.documents(files, dataset.form)
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
  train = Stream(
    path=dataset.path,
    files=tuple(files),
    form=dataset.form,
    tokenizer=tokenizer,
    length=dataset.length,
    packing=dataset.packing,
    held_out=fraction,
    virtual_shards=dataset.virtual_shards,
  )
  held_out = size = None
  if dataset.held_out_path:
    held_out, size = _load_held_out(dataset, tokenizer)
  elif fraction:
    held_out = dataclasses.replace(train, side="held_out")
    size = held_out.measured()
    if not size.tokens:
      raise _nothing_held_out(dataset)
  return Corpus(
    tokenizer=tokenizer,
    length=dataset.length,
    train=train,
    held_out=held_out,
    held_out_text=size,
  )

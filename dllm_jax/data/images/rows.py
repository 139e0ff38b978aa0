"""Pictures with their texts as rows: of image tokens, or of pixels.

A picture with a caption is two rows: the picture to be drawn of the caption, and
the caption to be said of the picture, asked `data.question`. A conversation is
one, and so is a text.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Many
import dataclasses
import itertools
from typing import Any

import numpy as np

from dllm_jax.core.images import ImageVocabulary
from dllm_jax.data import byte_pairs, source
from dllm_jax.data import tokenizer as tokenizers
from dllm_jax.data.dataset import Dataset
from dllm_jax.data.huggingface import HuggingFace
from dllm_jax.data.images import records as forms
from dllm_jax.data.images.pictures import decoded, fitted, pixels_of
from dllm_jax.data.images.protocol import ImageTokenizer
from dllm_jax.data.images.sequences import Sequence, Sequences
from dllm_jax.data.images.texts import joined
from dllm_jax.data.numbers import Numbers
from dllm_jax.data.packing import Row, TextSize

_AT_ONCE = 256  # pictures
PIXELS = 2**24
"""Values of a pixel: red, green and blue, a byte each, the first the highest."""


class FixedRows:
  """Whole rows that lie in memory, by index.

  Args:
    tokens: `[rows, L]`.
    counts: which of them count; None for all.
  """

  def __init__(self, tokens: np.ndarray, counts: np.ndarray | None = None):
    self._tokens, self._counts = tokens, counts

  def __len__(self) -> int:
    return len(self._tokens)

  def __getitem__(self, index: int) -> Row:
    tokens = self._tokens[index]
    counts = None if self._counts is None else self._counts[index]
    return Row(tokens, np.ones_like(tokens), counts)

  @property
  def size(self) -> TextSize:
    """What counts, by tokens alone: pictures have no characters."""
    count = self._tokens.size
    count = count if self._counts is None else int(self._counts.sum())
    return TextSize(count, count, count)


class Reading:
  """Reads pictures and texts on two sides, bad ones left out where that is asked.

  Attributes:
    bad: how many were left out.

  Args:
    dataset: what to read.
  """

  def __init__(self, dataset: Dataset):
    self._dataset, self.bad = dataset, 0

  def __iter__(self) -> Iterator[tuple[bool, forms.Record, Any]]:
    """Yields whether a record is held out, the record, and its Pillow image.

    Raises:
      ValueError: a record is bad, and is not to be left out.
    """
    fraction = self._dataset.held_out_of_path
    for record, image in self._read(self._dataset.path):
      yield held_out(record, fraction), record, image
    if self._dataset.held_out_path:
      for record, image in self._read(self._dataset.held_out_path):
        yield True, record, image

  def _read(self, path: str):
    for record in forms.read(forms.find(path)):
      if isinstance(record, forms.Bad):
        self._refuse(f"{record.where}: {record.reason}")
        continue
      try:
        image = self._picture(record)
      except ValueError as error:
        self._refuse(str(error))
        continue
      yield record, image

  def _picture(self, record: forms.Record):
    if record.image is None:
      return None
    image = decoded(record.image, record.where)
    return fitted(image, self._dataset.image_size, self._dataset.image_fit)

  def _refuse(self, reason: str) -> None:
    if not self._dataset.skip_bad:
      raise ValueError(f"{reason} (data.skip_bad leaves such records out)")
    self.bad += 1


def held_out(record: forms.Record, fraction: float) -> bool:
  """Returns whether a record is among the fraction that is held out."""
  text = record.text if record.messages is None else str(record.messages)
  seen = (record.image or b"").hex()
  return source.is_held_out(f"{text}\n{seen}", fraction)


def load_pixels(dataset: Dataset) -> dict[str, Any]:
  """Returns a corpus of pixels, a picture a row: fields of `data.Corpus`.

  Raises:
    ValueError: `length` is no square, or not that of `image_size`; as `Reading`.
  """
  side = dataset.image_size or round(dataset.length**0.5)
  if side * side != dataset.length:
    raise ValueError(
      f"data.length {dataset.length} must be image_size squared, the pixels of a"
      f" picture: with image_size {side} it is {side * side}"
    )
  sides: tuple[list, list] = [], []
  own = dataclasses.replace(dataset, image_size=side)
  for held, _, image in Reading(own):
    if image is not None:
      sides[held].append(packed(np.asarray(image)).reshape(-1))
  return {
    "tokenizer": Numbers(vocab_size=PIXELS + 1, mask_id=PIXELS),
    **_sides(dataset, sides, lambda rows: FixedRows(np.stack(rows))),
  }


def packed(picture: np.ndarray) -> np.ndarray:
  """Returns one number for each pixel of a picture of bytes."""
  red, green, blue = np.moveaxis(picture.astype(np.int32), -1, 0)
  return red << 16 | green << 8 | blue


def load_images(
  dataset: Dataset,
  tokenizer: HuggingFace | None,
  images: ImageTokenizer | None,
) -> dict[str, Any]:
  """Returns a corpus of pictures and texts as tokens: fields of `data.Corpus`.

  Raises:
    ValueError: there is no image tokenizer, pictures are no whole tokens, rows
      have no room; as `Reading`.
  """
  if images is None:
    raise ValueError(
      "data.format images needs data.image_tokenizer: the folder of one"
      " (showlab/magvitv2's layout), or the run that trained one"
    )
  number = tokens_of(images, dataset.image_size)
  if tokenizer is None:
    text = _text_tokenizer(dataset)
    tokenizer = joined(text, codes=images.codes, tokens=number)
  vocabulary = check(tokenizer, images, number)
  made = _Writer(dataset, tokenizer, vocabulary)
  sides: tuple[list[Sequence], list[Sequence]] = [], []
  for chunk in _batched(Reading(dataset), _AT_ONCE):
    pixels = [pixels_of(image) for *_, image in chunk if image is not None]
    codes = iter(images.encode(np.stack(pixels)) if pixels else ())
    for held, record, image in chunk:
      own = None if image is None else next(codes)
      sides[held].extend(made(record, own))

  def rows(some: Many[Sequence]) -> FixedRows:
    tokens, counts = (np.stack(part) for part in zip(*some, strict=True))
    return FixedRows(tokens, counts)

  return {"tokenizer": tokenizer, **_sides(dataset, sides, rows)}


def _batched(items, size: int):
  items = iter(items)
  while chunk := tuple(itertools.islice(items, size)):
    yield chunk


def tokens_of(images: ImageTokenizer, size: int) -> int:
  """Returns the tokens of a picture with a side of so many pixels.

  Raises:
    ValueError: they are no whole number.
  """
  if size < 1 or size % images.side:
    raise ValueError(
      f"data.image_size {size} must be a multiple of {images.side}, the pixels"
      " of a token's side, above 0"
    )
  return (size // images.side) ** 2


def check(
  tokenizer: HuggingFace, images: ImageTokenizer, number: int
) -> ImageVocabulary:
  """Returns the image tokens of a model's tokenizer.

  Raises:
    ValueError: it has none, or not those of an image tokenizer.
  """
  vocabulary = getattr(tokenizer, "images", None)
  if vocabulary is None:
    raise ValueError(
      "the model's tokens are of text alone: train or import one with images"
      " (configs/digits_mmada.py, MMaDA)"
    )
  if (vocabulary.codes, vocabulary.tokens) != (images.codes, number):
    raise ValueError(
      f"the model's pictures have {vocabulary.tokens} tokens of"
      f" {vocabulary.codes} codes, those of the image tokenizer {number} of"
      f" {images.codes}: they belong to different models"
    )
  return vocabulary


def _text_tokenizer(dataset: Dataset) -> HuggingFace:
  """Returns the tokenizer of text that is named, or learned from the texts."""
  name = dataset.tokenizer or "bpe:288"
  if not name.startswith("bpe:"):
    if name in ("char", "byte") or name.startswith("numbers:"):
      raise ValueError(
        f"data.tokenizer {name!r} has no special tokens for a model with images;"
        " legal: bpe:N, or the path of a tokenizer.json"
      )
    return tokenizers.make_tokenizer(name, (), mask_token=dataset.mask_token)

  def texts():
    for record in forms.read(forms.find(dataset.path)):
      if isinstance(record, forms.Bad) or held_out(
        record, dataset.held_out_of_path
      ):
        continue
      for message in record.messages or _messages(dataset, record.text):
        yield f"{message['role']}\n{message['content']}"

  return tokenizers.make_tokenizer(
    name,
    (),
    training_texts=byte_pairs.beginning(texts()),
    path=dataset.path,
  )


def _messages(dataset: Dataset, text: str) -> list[dict[str, str]]:
  return [
    {"role": "user", "content": dataset.question},
    {"role": "assistant", "content": text},
  ]


class _Writer:
  """Writes records as rows."""

  def __init__(self, dataset, tokenizer: HuggingFace, vocabulary):
    self._dataset, self._tokenizer = dataset, tokenizer
    self._build = Sequences(vocabulary=vocabulary, length=dataset.length)

  def __call__(self, record: forms.Record, codes) -> list[Sequence]:
    """Returns the rows of a record."""
    if record.messages is not None:
      return [self._said(record.messages, codes)]
    text = self._tokenizer.encode(record.text)
    if codes is None:
      return [self._build.text(text)]
    asked = _messages(self._dataset, record.text)
    return [self._build.to_image(text, codes), self._said(asked, codes)]

  def _said(self, messages, codes) -> Sequence:
    text = self._tokenizer.encode(
      self._tokenizer.render(messages, answer=False)
    )
    build = self._build
    return build.chat(text) if codes is None else build.understand(text, codes)


def _sides(dataset, sides, rows) -> dict[str, Any]:
  train, held = sides
  if not train:
    raise ValueError(
      f"{dataset.path}: nothing is left to train on; lower held_out, or give"
      " more pictures"
    )
  train, held = rows(train), rows(held) if held else None
  return {
    "train": train,
    "held_out": held,
    "held_out_text": held.size if held else None,
  }

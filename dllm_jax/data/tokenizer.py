"""Tokenizers: text to ids and back, each with a mask token of its own.

Behind one interface: characters, bytes, byte pairs learned from the training
text, and a Hugging Face `tokenizer.json`. All are frozen, comparable and written
to JSON whole, so that a run's directory carries its tokenizer and needs no other
file.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import json
from typing import Protocol

import numpy as np

from dllm_jax.data import byte_pairs
from dllm_jax.data.huggingface import HuggingFace, huggingface
from dllm_jax.data.numbers import legal, MASK_GLYPH, Numbers, Plain, unmasked


class Tokenizer(Protocol):
  """Text to token ids and back.

  Attributes:
    vocab_size: the number of real ids, the mask included.
    mask_id: the mask token; no text encodes to it.
    pad_id: the padding token, or None.
    eos_id: what ends a document, or None.
    bos_id: the token that is called the beginning of a text, or None: whether
      texts begin with it is for `begin_ids` to say.
    begin_ids: what stands before every text, most often nothing.
    after_ids: what stands after every whole text, most often nothing.
    end_ids: what ends a row that is sampled, the end of a turn included.
  """

  vocab_size: int
  mask_id: int
  pad_id: int | None
  eos_id: int | None
  bos_id: int | None
  begin_ids: tuple[int, ...]
  after_ids: tuple[int, ...]
  end_ids: tuple[int, ...]

  def encode(self, text: str) -> np.ndarray:
    """Returns the int32 ids of a text, without what stands around it."""

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns `encode` of each text, sooner than one by one."""

  def prompt(self, text: str) -> np.ndarray:
    """Returns the int32 ids of a text to go on from, as it begins."""

  def encode_spans(self, parts: Sequence[str | int]) -> list[int | None]:
    """Returns the ids of a whole text with slots, None, in it.

    Args:
      parts: texts, and how many slots there are between them.
    """

  def decode(
    self,
    ids: Sequence[int],
    *,
    mask: str = MASK_GLYPH,
    special: bool = False,
  ) -> str:
    """Returns the text of ids, each mask token shown as `mask`.

    Args:
      ids: token ids.
      mask: what stands for each mask.
      special: whether special tokens are written out, by their names.
    """

  def to_json(self) -> str:
    """Returns the whole tokenizer as JSON, for `tokenizer_from_json`."""


@dataclasses.dataclass(frozen=True)
class Characters(Plain):
  """One token a character; the mask comes after the last of them.

  Attributes:
    vocabulary: the characters, in the order of their code points.
  """

  vocabulary: str

  def __post_init__(self):
    if not self.vocabulary or list(self.vocabulary) != sorted(
      set(self.vocabulary)
    ):
      raise ValueError(
        "a character vocabulary must be distinct characters in order, at "
        f"least one; got {self.vocabulary[:40]!r}"
      )

  @property
  def mask_id(self) -> int:
    """The id after the last character."""
    return len(self.vocabulary)

  @property
  def vocab_size(self) -> int:
    """Characters and the mask."""
    return len(self.vocabulary) + 1

  @functools.cached_property
  def _points(self) -> np.ndarray:
    return _code_points(self.vocabulary)

  def encode(self, text: str) -> np.ndarray:
    """Returns the int32 ids of a text.

    Raises:
      ValueError: a character is not in the vocabulary.
    """
    points = _code_points(text)
    ids = np.searchsorted(self._points, points).astype(np.int32)
    known = self._points[np.minimum(ids, len(self._points) - 1)] == points
    if not known.all():
      at = int(np.argmin(known))
      raise ValueError(
        f"character {text[at]!r} at position {at} is not among the "
        f"{len(self._points)} of the vocabulary; remove it, or train with a "
        "text that has it or with tokenizer 'byte'"
      )
    return ids

  def decode(
    self,
    ids: Sequence[int],
    *,
    mask: str = MASK_GLYPH,
    special: bool = False,
  ) -> str:
    """Returns the text of ids, each mask token shown as `mask`."""
    glyphs = [*self.vocabulary, mask]
    return "".join(glyphs[i] for i in legal(ids, self.vocab_size))

  def to_json(self) -> str:
    """Returns the whole tokenizer as JSON."""
    return json.dumps({"kind": "char", "vocabulary": self.vocabulary})


def _code_points(text: str) -> np.ndarray:
  return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@dataclasses.dataclass(frozen=True)
class Bytes(Plain):
  """One token a byte of UTF-8; the mask is 256."""

  mask_id = 256
  vocab_size = 257

  def encode(self, text: str) -> np.ndarray:
    """Returns the int32 ids of a text."""
    data = text.encode(errors="surrogatepass")
    return np.frombuffer(data, np.uint8).astype(np.int32)

  def decode(
    self,
    ids: Sequence[int],
    *,
    mask: str = MASK_GLYPH,
    special: bool = False,
  ) -> str:
    """Returns the text of ids; bytes that are not UTF-8 become U+FFFD."""
    runs = unmasked(legal(ids, self.vocab_size), self.mask_id)
    return "".join(
      mask * len(run) if masked else bytes(run).decode(errors="replace")
      for masked, run in runs
    )

  def to_json(self) -> str:
    """Returns the whole tokenizer as JSON."""
    return json.dumps({"kind": "byte"})


def tokenizer_from_json(text: str) -> Tokenizer:
  """Returns the tokenizer that `to_json` wrote.

  Raises:
    ValueError: the text is something else.
  """
  kinds = {
    "char": Characters,
    "byte": Bytes,
    "huggingface": HuggingFace,
    "numbers": Numbers,
  }
  try:
    fields = json.loads(text)
    return kinds[fields.pop("kind")](**fields)
  except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
    raise ValueError(
      f"not a saved tokenizer ({error}); legal kinds are: {', '.join(kinds)}"
    ) from error


def characters(texts: Iterable[str], path: str = "the text") -> Characters:
  """Returns the tokenizer of the characters that occur in texts.

  Raises:
    ValueError: there are none.
  """
  found = set()
  for text in texts:
    found.update(text)
  if not found:
    raise ValueError(f"{path} is empty; give a file with text in it")
  return Characters("".join(sorted(found)))


def make_tokenizer(
  name: str,
  texts: Iterable[str],
  *,
  training_texts: Iterable[str] = (),
  mask_token: str | None = None,
  path: str = "the text",
) -> Tokenizer:
  """Returns a tokenizer by name.

  Args:
    name: "char", "byte", "bpe:N" for N ids of byte pairs or "numbers:N" for N
      ids, of which the last is the mask, or the path of a `tokenizer.json`.
    texts: where the characters of "char" are found; unread by the others.
    training_texts: what "bpe:N" learns from, never held-out text.
    mask_token: see `huggingface`.
    path: where the texts are from, for messages.

  Raises:
    FileNotFoundError: there is no such tokenizer.json.
    ValueError: a mask token where none can be named, or one that is missing; a
      size that is too small, or too large for the text.
  """
  own_mask = name in ("char", "byte") or name.startswith("bpe:")
  if own_mask and mask_token is not None:
    raise ValueError(
      f"tokenizer {name!r} has a mask of its own; mask_token must be None"
    )
  if name == "char":
    return characters(texts, path)
  if name == "byte":
    return Bytes()
  if name.startswith("bpe:"):
    mask_id = _byte_pairs_size(name) - 1
    learned = byte_pairs.learn(training_texts, mask_id, path=path)
    return HuggingFace(definition=learned, mask_id=mask_id)
  if name.startswith("numbers:"):
    size = name.removeprefix("numbers:")
    if not size.isdigit() or int(size) < 2:
      raise ValueError(
        f"tokenizer {name!r} must be numbers:N, with at least 2 ids"
      )
    return Numbers(vocab_size=int(size), mask_id=int(size) - 1)
  return huggingface(name, mask_token=mask_token)


def _byte_pairs_size(name: str) -> int:
  size = name.removeprefix("bpe:")
  least = Bytes.vocab_size + 1
  if not (size.isascii() and size.isdigit()) or int(size) < least:
    raise ValueError(
      f"tokenizer {name!r} must be bpe:N, with N at least {least}: the 256 "
      "bytes, a pair and the mask"
    )
  return int(size)


def may_be(name: str, tokenizer: Tokenizer) -> bool | None:
  """Returns whether a tokenizer is of a kind that is learned from text.

  Args:
    name: "char", "bpe:N", or what is not learned, for which this is None.
    tokenizer: the tokenizer.
  """
  if name == "char":
    return isinstance(tokenizer, Characters)
  if name.startswith("bpe:"):
    same_size = tokenizer.vocab_size == _byte_pairs_size(name)
    return isinstance(tokenizer, HuggingFace) and same_size
  return None

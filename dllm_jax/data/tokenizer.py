"""Tokenizers: text to ids and back, each with a mask token of its own.

Three kinds behind one interface: characters, bytes, and a Hugging Face
`tokenizer.json`. All are frozen, comparable and written to JSON whole, so that
a run's directory carries its tokenizer and needs no other file.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import itertools
import json
import pathlib
from typing import Protocol

import numpy as np

from dllm_jax.data import chat
from dllm_jax.data.numbers import Numbers

MASK_GLYPH = "▁"
# Longer texts are encoded in pieces that end after a line: the time and memory
# of one call grow faster than the text.
_PIECE_CHARACTERS = 2**20
_ROLES = {
  "pad": ("<pad>", "[PAD]", "<|pad|>"),
  "eos": ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]"),
  "bos": ("<s>", "<bos>", "<|begin_of_text|>", "[CLS]"),
}


class Tokenizer(Protocol):
  """Text to token ids and back.

  Attributes:
    vocab_size: the number of real ids, the mask included.
    mask_id: the mask token; no text encodes to it.
    pad_id: the padding token, or None.
    eos_id: what ends a document, or None.
    bos_id: what begins a document, or None.
  """

  vocab_size: int
  mask_id: int
  pad_id: int | None
  eos_id: int | None
  bos_id: int | None

  def encode(self, text: str) -> np.ndarray:
    """Returns the int32 ids of a text."""

  def decode(self, ids: Sequence[int], *, mask: str = MASK_GLYPH) -> str:
    """Returns the text of ids, each mask token shown as `mask`."""

  def to_json(self) -> str:
    """Returns the whole tokenizer as JSON, for `tokenizer_from_json`."""


def _legal(ids: Sequence[int], vocab_size: int) -> np.ndarray:
  ids = np.asarray(ids, np.int64).reshape(-1)
  if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
    raise ValueError(
      f"token id {ids.max() if ids.min() >= 0 else ids.min()} is not in the "
      f"vocabulary; legal ids are 0 to {vocab_size - 1}"
    )
  return ids


def _unmasked(
  ids: np.ndarray, mask_id: int
) -> Iterable[tuple[bool, list[int]]]:
  """Yields (whether they are masks, ids) for each run of ids."""
  for masked, run in itertools.groupby(ids.tolist(), lambda i: i == mask_id):
    yield masked, list(run)


@dataclasses.dataclass(frozen=True)
class Characters:
  """One token a character; the mask comes after the last of them.

  Attributes:
    vocabulary: the characters, in the order of their code points.
  """

  vocabulary: str
  pad_id = eos_id = bos_id = None

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

  def decode(self, ids: Sequence[int], *, mask: str = MASK_GLYPH) -> str:
    """Returns the text of ids, each mask token shown as `mask`."""
    glyphs = [*self.vocabulary, mask]
    return "".join(glyphs[i] for i in _legal(ids, self.vocab_size))

  def to_json(self) -> str:
    """Returns the whole tokenizer as JSON."""
    return json.dumps({"kind": "char", "vocabulary": self.vocabulary})


def _code_points(text: str) -> np.ndarray:
  return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@dataclasses.dataclass(frozen=True)
class Bytes:
  """One token a byte of UTF-8; the mask is 256."""

  pad_id = eos_id = bos_id = None
  mask_id = 256
  vocab_size = 257

  def encode(self, text: str) -> np.ndarray:
    """Returns the int32 ids of a text."""
    data = text.encode(errors="surrogatepass")
    return np.frombuffer(data, np.uint8).astype(np.int32)

  def decode(self, ids: Sequence[int], *, mask: str = MASK_GLYPH) -> str:
    """Returns the text of ids; bytes that are not UTF-8 become U+FFFD."""
    runs = _unmasked(_legal(ids, self.vocab_size), self.mask_id)
    return "".join(
      mask * len(run) if masked else bytes(run).decode(errors="replace")
      for masked, run in runs
    )

  def to_json(self) -> str:
    """Returns the whole tokenizer as JSON."""
    return json.dumps({"kind": "byte"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFace:
  """The tokenizer of a `tokenizer.json`.

  Text is text: the name of a special token in it is encoded by its letters.

  Attributes:
    definition: the content of the file.
    mask_id: the mask token: one of the file's, or the id after its last.
    pad_id: the padding token, or None.
    eos_id: what ends a document, or None.
    bos_id: what begins a document, or None.
    size: ids that the network knows, where they are more than the file's.
    chat_template: the Jinja template of a conversation, or None.
  """

  definition: str = dataclasses.field(repr=False)
  mask_id: int
  pad_id: int | None = None
  eos_id: int | None = None
  bos_id: int | None = None
  size: int = 0
  chat_template: str | None = dataclasses.field(default=None, repr=False)

  @functools.cached_property
  def _tokenizer(self):
    import tokenizers  # noqa: PLC0415  Slow to import; most uses do without.

    tokenizer = tokenizers.Tokenizer.from_str(self.definition)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer

  @functools.cached_property
  def vocab_size(self) -> int:
    """The number of real ids, the mask included."""
    return max(self.last_id, self.mask_id, self.size - 1) + 1

  @functools.cached_property
  def last_id(self) -> int:
    """The last id of the file."""
    return max(self._tokenizer.get_vocab(with_added_tokens=True).values())

  def encode(self, text: str) -> np.ndarray:
    """Returns the int32 ids of a text, without special tokens around it.

    Raises:
      ValueError: the text contains the mask token.
    """
    encodings = self._tokenizer.encode_batch_fast(
      list(_pieces(text)), add_special_tokens=False
    )
    ids = [np.asarray(e.ids, np.int32) for e in encodings]
    ids = np.concatenate(ids) if ids else np.zeros((0,), np.int32)
    if (ids == self.mask_id).any():
      raise ValueError(
        "a text contains the mask token "
        f"{self._tokenizer.id_to_token(self.mask_id)!r}; remove it from the "
        "text or choose another mask_token"
      )
    return ids

  def decode(self, ids: Sequence[int], *, mask: str = MASK_GLYPH) -> str:
    """Returns the text of ids, masks as `mask`, special tokens left out."""
    runs = _unmasked(_legal(ids, self.vocab_size), self.mask_id)
    return "".join(
      mask * len(run) if masked else self._tokenizer.decode(run)
      for masked, run in runs
    )

  def chat(
    self, messages: Sequence[chat.Message], *, answer: bool = True
  ) -> np.ndarray:
    """Returns the int32 ids of a conversation, by the chat template.

    Args:
      messages: what was said, `{"role": ..., "content": ...}` each.
      answer: whether the ids end where the model's answer begins.

    Raises:
      ValueError: there is no template, or it refuses the messages.
    """
    if self.chat_template is None:
      raise ValueError(
        "this tokenizer has no chat template; use a model with a"
        " chat_template in its tokenizer_config.json"
      )
    roles = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
    token = lambda i: "" if i is None else self._tokenizer.id_to_token(i)
    text = chat.render(
      self.chat_template,
      messages,
      answer=answer,
      **{f"{role}_token": token(i) for role, i in roles.items()},
    )
    import tokenizers  # noqa: PLC0415

    # Here, and only here, the names of special tokens are those tokens.
    parser = tokenizers.Tokenizer.from_str(self.definition)
    parser.no_truncation()
    ids = parser.encode(text, add_special_tokens=False).ids
    return np.asarray(ids, np.int32)

  def to_json(self) -> str:
    """Returns the whole tokenizer as JSON."""
    return json.dumps({"kind": "huggingface", **dataclasses.asdict(self)})


def _pieces(text: str) -> Iterable[str]:
  """Yields a text in pieces of bounded size, cut after a line if possible."""
  start = 0
  while start < len(text):
    stop = start + _PIECE_CHARACTERS
    if stop < len(text):
      stop = text.rfind("\n", start, stop) + 1 or stop
    yield text[start:stop]
    start = stop


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


def huggingface(path: str, *, mask_token: str | None = None) -> HuggingFace:
  """Returns the tokenizer of a `tokenizer.json`.

  The roles of its special tokens are read from a `tokenizer_config.json` beside
  it, or else from the usual names.

  Args:
    path: the file, or the directory that holds it.
    mask_token: the token that is the mask; None: the `mask_token` of
      `tokenizer_config.json`, or else a new id after the last one.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is something else, or has no such mask token.
  """
  import tokenizers  # noqa: PLC0415  Slow to import; most uses do without.

  file = pathlib.Path(path).expanduser()
  file = file / "tokenizer.json" if file.is_dir() else file
  if not file.is_file():
    raise FileNotFoundError(
      f"tokenizer {str(path)!r} does not exist; legal are 'char', 'byte' or "
      "the path of a tokenizer.json"
    )
  try:
    definition = file.read_text(encoding="utf-8")
    tokenizer = tokenizers.Tokenizer.from_str(definition)
  except Exception as error:  # The package raises bare Exception.
    raise ValueError(
      f"{file} is not a tokenizer.json ({error}); give the file that the "
      "tokenizers package saves"
    ) from error
  vocabulary = tokenizer.get_vocab(with_added_tokens=True)
  named = _named_roles(file.with_name("tokenizer_config.json"))
  if mask_token is not None and mask_token not in vocabulary:
    raise ValueError(
      f"{file} has no mask token {mask_token!r}; name one of its tokens, or "
      "None for a new one"
    )
  mask_token = mask_token or named.get("mask")
  ids = {}
  for role, usual in _ROLES.items():
    names = [named[role]] if role in named else usual
    ids[f"{role}_id"] = next(
      (vocabulary[n] for n in names if n in vocabulary), None
    )
  appended = max(vocabulary.values()) + 1
  return HuggingFace(
    definition=definition,
    mask_id=vocabulary.get(mask_token, appended),
    chat_template=chat.read_template(file.parent),
    **ids,
  )


def _named_roles(path: pathlib.Path) -> dict[str, str]:
  """Returns the special tokens that a `tokenizer_config.json` names."""
  if not path.is_file():
    return {}
  try:
    fields = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(
      f"{path} is not JSON ({error}); mend or remove it"
    ) from error
  roles = {}
  for role in (*_ROLES, "mask"):
    token = fields.get(f"{role}_token")
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str):
      roles[role] = token
  return roles


def make_tokenizer(
  name: str,
  texts: Iterable[str],
  *,
  mask_token: str | None = None,
  path: str = "the text",
) -> Tokenizer:
  """Returns a tokenizer by name.

  Args:
    name: "char", "byte", "numbers:N" for N ids of which the last is the mask, or
      the path of a `tokenizer.json`.
    texts: where the characters of "char" are found; unread by the others.
    mask_token: see `huggingface`.
    path: where the texts are from, for messages.

  Raises:
    FileNotFoundError: there is no such tokenizer.json.
    ValueError: a mask token where none can be named, or one that is missing.
  """
  if name in ("char", "byte"):
    if mask_token is not None:
      raise ValueError(
        f"tokenizer {name!r} has a mask of its own; mask_token must be None"
      )
    return characters(texts, path) if name == "char" else Bytes()
  if name.startswith("numbers:"):
    size = name.removeprefix("numbers:")
    if not size.isdigit() or int(size) < 2:
      raise ValueError(
        f"tokenizer {name!r} must be numbers:N, with at least 2 ids"
      )
    return Numbers(vocab_size=int(size), mask_id=int(size) - 1)
  return huggingface(name, mask_token=mask_token)

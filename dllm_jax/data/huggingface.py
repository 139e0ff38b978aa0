"""Tokenizers of published folders: `tokenizer.json` and the files beside it.

Older folders have the parts of one, `vocab.json` and `merges.txt`, instead, and
keep some special tokens and their roles in other files.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np

from dllm_jax.data import chat
from dllm_jax.data.byte_pairs import byte_level, QWEN_WORDS
from dllm_jax.data.chat import Message
from dllm_jax.data.ids import legal, MASK_GLYPH, pieces, unmasked

_ROLES = {
  "pad": ("<pad>", "[PAD]", "<|pad|>"),
  "eos": ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]"),
  "bos": ("<s>", "<bos>", "<|begin_of_text|>", "[CLS]"),
}
_PARTS = ("vocab.json", "merges.txt")
_BYTE_PAIRS = {
  "GPT2Tokenizer": None,
  "Qwen2Tokenizer": QWEN_WORDS,
  "DreamTokenizer": QWEN_WORDS,
}


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
      list(pieces(text)), add_special_tokens=False
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
    runs = unmasked(legal(ids, self.vocab_size), self.mask_id)
    return "".join(
      mask * len(run) if masked else self._tokenizer.decode(run)
      for masked, run in runs
    )

  def chat(
    self, messages: Sequence[Message], *, answer: bool = True
  ) -> np.ndarray:
    """Returns the int32 ids of a conversation, as `render` writes it.

    Args:
      messages: what was said, `{"role": ..., "content": ...}` each.
      answer: whether the ids end where the model's answer begins.

    Raises:
      ValueError: there is no template, or it refuses the messages.
    """
    return self.encode_rendered(self.render(messages, answer=answer))

  def encode_rendered(self, text: str) -> np.ndarray:
    """Returns the int32 ids of a text of `render`'s.

    Here, and only here, the names of special tokens are those tokens.
    """
    ids = self._parser.encode(text, add_special_tokens=False).ids
    return np.asarray(ids, np.int32)

  @functools.cached_property
  def _parser(self):
    import tokenizers  # noqa: PLC0415

    parser = tokenizers.Tokenizer.from_str(self.definition)
    parser.no_truncation()
    return parser

  def render(self, messages: Sequence[Message], *, answer: bool = True) -> str:
    """Returns a conversation as text, by the chat template.

    Args:
      messages: what was said, `{"role": ..., "content": ...}` each.
      answer: whether the text ends where the model's answer begins.

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
    return chat.render(
      self.chat_template,
      messages,
      answer=answer,
      **{f"{role}_token": token(i) for role, i in roles.items()},
    )

  def save(self, folder: pathlib.Path) -> None:
    """Writes a `tokenizer.json`, and what a published folder has beside it."""
    (folder / "tokenizer.json").write_text(self.definition, encoding="utf-8")
    roles = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
    roles["mask"] = self.mask_id
    tokens = {
      f"{role}_token": self._tokenizer.id_to_token(i)
      for role, i in roles.items()
      if i is not None and i <= self.last_id
    }
    if self.chat_template is not None:
      tokens["chat_template"] = self.chat_template
    text = json.dumps(tokens, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

  def to_json(self) -> str:
    """Returns the whole tokenizer as JSON."""
    return json.dumps({"kind": "huggingface", **dataclasses.asdict(self)})


def huggingface(path: str, *, mask_token: str | None = None) -> HuggingFace:
  """Returns the tokenizer of a published folder.

  Its special tokens and their roles are read from `tokenizer_config.json`,
  `special_tokens_map.json` and `added_tokens.json` beside it, or else from the
  usual names.

  Args:
    path: a `tokenizer.json`, or the folder that holds it or its parts.
    mask_token: the token that is the mask; None: the `mask_token` of
      `tokenizer_config.json`, or else a new id after the last one.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is something else, or has no such mask token.
  """
  file = pathlib.Path(path).expanduser()
  file = file / "tokenizer.json" if file.is_dir() else file
  folder = file.parent
  settings = _read(folder / "tokenizer_config.json")
  tokenizer = _load(file, path, settings)
  added = _add_tokens(tokenizer, folder, settings)
  whole = file.is_file() and not added
  vocabulary = tokenizer.get_vocab(with_added_tokens=True)
  named = _roles(_read(folder / "special_tokens_map.json")) | _roles(settings)
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
    definition=file.read_text("utf-8") if whole else tokenizer.to_str(),
    mask_id=vocabulary.get(mask_token, appended),
    chat_template=chat.read_template(folder),
    **ids,
  )


def has_tokenizer(folder: pathlib.Path) -> bool:
  """Whether a folder holds a tokenizer, or the parts of one."""
  return (folder / "tokenizer.json").is_file() or all(
    (folder / part).is_file() for part in _PARTS
  )


def _load(file: pathlib.Path, path: str, settings: Mapping[str, Any]):
  """Returns the tokenizer of a file, or of the parts beside where it would be."""
  import tokenizers  # noqa: PLC0415  Slow to import; most uses do without.

  parts = file.name == "tokenizer.json" and has_tokenizer(file.parent)
  if not file.is_file() and not parts:
    raise FileNotFoundError(
      f"tokenizer {str(path)!r} does not exist; legal are 'char', 'byte', "
      "'bpe:N' or the path of a tokenizer.json"
    )
  words = None if file.is_file() else _words(file.parent, settings)
  try:
    if file.is_file():
      definition = file.read_text(encoding="utf-8")
      return tokenizers.Tokenizer.from_str(definition)
    return _from_parts(file.parent, words)
  except Exception as error:  # The package raises bare Exception.
    name = file if file.is_file() else file.with_name(_PARTS[0])
    raise ValueError(
      f"{name} is not a {name.name} ({error}); give the file that the "
      "tokenizers package saves"
    ) from error


def _words(folder: pathlib.Path, settings: Mapping[str, Any]) -> str | None:
  """Returns the expression that cuts words, None for GPT-2's own."""
  kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
  if kind not in _BYTE_PAIRS:
    raise ValueError(
      f"{folder / 'tokenizer_config.json'}: tokenizer_class {kind} is unknown;"
      f" legal without a tokenizer.json: {', '.join(_BYTE_PAIRS)}; or remove"
      f" {_PARTS[0]}, and text is token ids"
    )
  return _BYTE_PAIRS[kind]


def _from_parts(folder: pathlib.Path, words: str | None):
  """Returns the byte-level tokenizer of a vocabulary and its merges."""
  from tokenizers import models, normalizers  # noqa: PLC0415

  vocabulary, merges = (str(folder / part) for part in _PARTS)
  made = byte_level(models.BPE.from_file(vocabulary, merges), words)
  if words is not None:
    made.normalizer = normalizers.NFC()
  return made


def _add_tokens(tokenizer, folder, settings: Mapping[str, Any]) -> int:
  """Adds the tokens that only the files beside a tokenizer name; counts them.

  Raises:
    ValueError: one would get another id than they say.
  """
  import tokenizers  # noqa: PLC0415

  listed = {
    int(i): dict(token)
    for i, token in settings.get("added_tokens_decoder", {}).items()
  }
  for text, i in _read(folder / "added_tokens.json").items():
    listed.setdefault(i, {"content": text, "special": True})
  known = tokenizer.get_vocab(with_added_tokens=True)
  flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
  count = 0
  for i, token in sorted(listed.items()):
    text = token["content"]
    if text not in known:
      count += 1
      options = {name: token[name] for name in flags if name in token}
      special = options.pop("special", True)
      added = tokenizers.AddedToken(text, special=special, **options)
      (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([
        added
      ])
    if tokenizer.token_to_id(text) != i:
      raise ValueError(
        f"{folder}: token {text!r} is {tokenizer.token_to_id(text)}, but the"
        f" files beside the tokenizer say {i}; they belong to different models"
      )
  return count


def _read(path: pathlib.Path) -> dict[str, Any]:
  """Returns a JSON object, empty where there is no file."""
  if not path.is_file():
    return {}
  try:
    fields = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(
      f"{path} is not JSON ({error}); mend or remove it"
    ) from error
  if not isinstance(fields, dict):
    raise ValueError(f"{path} must hold a JSON object; mend or remove it")
  return fields


def _roles(fields: Mapping[str, Any]) -> dict[str, str]:
  """Returns the special tokens that a file names, by their role."""
  roles = {}
  for role in (*_ROLES, "mask"):
    token = fields.get(f"{role}_token")
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str):
      roles[role] = token
  return roles

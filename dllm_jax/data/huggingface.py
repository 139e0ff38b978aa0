"""Tokenizers of published folders: `tokenizer.json` and the files beside it.

Text becomes the ids that transformers (5.24.0) makes of it: names of special
tokens in it are those tokens (the mask's apart, which no text can hold), and what
stands before a text is the tokenizer's own business, whatever a `config.json`
calls the beginning.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
from typing import Any

import numpy as np

from dllm_jax.core import paths
from dllm_jax.core.images import ImageVocabulary
from dllm_jax.core.paths import Path
from dllm_jax.data import chat as chats
from dllm_jax.data import tokenizer_json
from dllm_jax.data.chat import Message
from dllm_jax.data.numbers import ends, legal, MASK_GLYPH, unmasked
from dllm_jax.data.tokenizer_json import has_tokenizer as has_tokenizer

# Where no file says which token ends a text, pads or begins one.
_USUAL = {
  "pad": ("<pad>", "[PAD]", "<|pad|>"),
  "eos": ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[SEP]"),
  "bos": ("<s>", "<bos>", "<|begin_of_text|>", "[CLS]"),
}
_CONTEXT = 8  # tokens that decide how the next ones are spelled
_SPACES = (
  (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
  (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"),
  (" 're", "'re"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class HuggingFace:
  """The tokenizer of a `tokenizer.json`.

  Attributes:
    definition: the content of the file, what stands around a text included.
    mask_id: the mask token: one of the file's, or the id after its last.
    pad_id: the padding token, or None.
    eos_id: what ends a document, or None.
    bos_id: the token that is called the beginning of a text, or None.
    end_ids: what ends a row that is sampled; empty for `eos_id` alone.
    size: ids that the network knows, where they are more than the file's.
    named: the special tokens that the files name, as templates read them:
      `bos_token` and so on.
    chat_templates: Jinja templates of conversations, by name.
    splits_special: whether names of special tokens in a text are its letters.
    tidies_spaces: whether spaces before punctuation are left out of a text that
      is decoded.
  """

  definition: str = dataclasses.field(repr=False)
  mask_id: int
  pad_id: int | None = None
  eos_id: int | None = None
  bos_id: int | None = None
  end_ids: tuple[int, ...] = ()
  size: int = 0
  named: Mapping[str, str] = dataclasses.field(default_factory=dict, hash=False)
  chat_templates: Mapping[str, str] = dataclasses.field(
    default_factory=dict, hash=False, repr=False
  )
  splits_special: bool = False
  tidies_spaces: bool = False
  images: ImageVocabulary | None = None

  def __post_init__(self):
    if isinstance(self.images, Mapping):  # as JSON has it
      object.__setattr__(self, "images", ImageVocabulary(**self.images))
    object.__setattr__(self, "end_ids", ends(self.end_ids, self.eos_id))

  @functools.cached_property
  def _tokenizer(self):
    import tokenizers  # noqa: PLC0415  Slow to import; most uses do without.

    tokenizer = tokenizers.Tokenizer.from_str(self.definition)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = self.splits_special
    return tokenizer

  @functools.cached_property
  def _with_mask(self):
    """The tokenizer with the mask among its tokens, and the mask's name."""
    import tokenizers  # noqa: PLC0415

    added = self._tokenizer.get_added_tokens_decoder()
    if self.mask_id in added and not self.splits_special:
      return self._tokenizer, added[self.mask_id].content
    made = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
    name = "<|a mask that no text holds|>"
    made.add_special_tokens([name])
    return made, name

  @functools.cached_property
  def vocab_size(self) -> int:
    """The number of real ids, the mask included."""
    return max(self.last_id, self.mask_id, self.size - 1) + 1

  @functools.cached_property
  def last_id(self) -> int:
    """The last id of the file."""
    return max(self._tokenizer.get_vocab(with_added_tokens=True).values())

  @functools.cached_property
  def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tokenizer_json.surroundings(self._tokenizer)

  @property
  def begin_ids(self) -> tuple[int, ...]:
    """What stands before every text: nothing, for most."""
    return self._around[0]

  @property
  def after_ids(self) -> tuple[int, ...]:
    """What stands after every text that is whole: nothing, for most."""
    return self._around[1]

  @property
  def chat_template(self) -> str | None:
    """The template of a conversation without tools, or None."""
    return self.chat_templates.get("default")

  def encode(self, text: str) -> np.ndarray:
    """Returns the int32 ids of a text, without what stands around it.

    Raises:
      ValueError: the text contains the mask token, which is no special token.
    """
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns `encode` of each text, sooner than one by one.

    Raises:
      ValueError: a text contains the mask token, which is no special token.
    """
    found = tokenizer_json.encode_batch(self._tokenizer, texts)
    return [
      self._without_mask(text) if (ids == self.mask_id).any() else ids
      for text, ids in zip(texts, found, strict=True)
    ]

  def spell(self, parts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of short parts of texts, as lists.

    The mask's name, which no text can hold, is the mask here.
    """
    encodings = self._tokenizer.encode_batch_fast(
      parts, add_special_tokens=False
    )
    return [encoding.ids for encoding in encodings]

  def _without_mask(self, text: str) -> np.ndarray:
    """Returns the ids of a text in which the mask's name is a word like others.

    Deviates: transformers makes the mask of it, which no text can hold.
    """
    import tokenizers  # noqa: PLC0415

    name = self._tokenizer.id_to_token(self.mask_id)
    letters = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
    letters.encode_special_tokens = True
    word = tokenizer_json.encode(letters, name)
    found = []
    for part in text.split(name):
      found += [tokenizer_json.encode(self._tokenizer, part), word]
    ids = np.concatenate(found[:-1])
    if (ids == self.mask_id).any():
      raise ValueError(
        f"a text contains the mask token {name!r}; remove it from the text or "
        "choose another mask_token"
      )
    return ids

  def prompt(self, text: str) -> np.ndarray:
    """Returns the int32 ids of a text to go on from: begun, but not ended.

    Raises:
      ValueError: the text contains the mask token.
    """
    ids = self.encode(text)
    return np.concatenate([np.asarray(self.begin_ids, np.int32), ids])

  def encode_spans(self, parts: Sequence[str | int]) -> list[int | None]:
    """Returns the ids of a whole text with masks, None at each of them.

    Args:
      parts: texts, and how many masks there are between them.
    """
    tokenizer, mask = self._with_mask
    text = "".join(p if isinstance(p, str) else mask * p for p in parts)
    slot = tokenizer.token_to_id(mask)
    ids = tokenizer_json.encode(tokenizer, text).tolist()
    found = (None if i == slot else i for i in ids)
    return [*self.begin_ids, *found, *self.after_ids]

  def decode(
    self,
    ids: Sequence[int],
    *,
    mask: str = MASK_GLYPH,
    special: bool = False,
  ) -> str:
    """Returns the text of ids.

    Args:
      ids: token ids.
      mask: what stands for each mask.
      special: whether special tokens are written out, by their names.
    """
    found, before = [], []
    for masked, run in unmasked(legal(ids, self.vocab_size), self.mask_id):
      if masked:
        found.append(mask * len(run))
        continue
      # How a token is spelled may depend on those before it, masks apart.
      context = before[-_CONTEXT:]
      known = self._decode(context, special)
      text = self._decode(context + run, special)
      whole = text.startswith(known)
      found.append(text[len(known) :] if whole else self._decode(run, special))
      before = context + run
    return "".join(found)

  def _decode(self, ids: Sequence[int], special: bool) -> str:
    text = ""
    if ids:
      text = self._tokenizer.decode(ids, skip_special_tokens=not special)
    for spaced, tidy in _SPACES if self.tidies_spaces else ():
      text = text.replace(spaced, tidy)
    return text

  def chat(self, messages: Sequence[Message], **options: Any) -> np.ndarray:
    """Returns the int32 ids of a conversation, as `render` writes it.

    Args:
      messages: what was said, `{"role": ..., "content": ...}` each.
      **options: `render`'s.

    Raises:
      ValueError: there is no template, or it refuses the messages.
    """
    return self.encode(self.render(messages, **options))

  def encode_places(
    self, texts: Sequence[str]
  ) -> list[tuple[np.ndarray, np.ndarray]]:
    """Returns the ids of texts, and where each token is in its text.

    As in `tokenizer_json.places`; the mask's name is the mask here.
    """
    return tokenizer_json.places(self._tokenizer, texts)

  def render(self, messages: Sequence[Message], **options: Any) -> str:
    """Returns a conversation as text, by a chat template.

    Args:
      messages: what was said, `{"role": ..., "content": ...}` each.
      **options: `chat.render`'s (`answer`, `continued`, `tools`, `documents` and
        what else the template reads), and `template`, the name of one.

    Raises:
      ValueError: there is no template, or it refuses the messages.
    """
    template = chats.choose(
      self.chat_templates,
      name=options.pop("template", None),
      tools=options.get("tools"),
    )
    return chats.render(template, messages, **dict(self.named) | options).text

  @functools.cached_property
  def turn_end_id(self) -> int | None:
    """The special token with which the template ends an answer, or None."""
    words = [{"role": "user", "content": "a"}]
    words.append({"role": "assistant", "content": "the answer"})
    try:
      text = self.render(words, answer=False)
    except ValueError:  # There is none, or it wants more than that.
      return None
    _, found, after = text.rpartition("the answer")
    ids = self.encode(after).tolist() if found else []
    return next((i for i in ids if i in self.special_ids), None)

  @functools.cached_property
  def special_ids(self) -> frozenset[int]:
    """The special tokens."""
    added = self._tokenizer.get_added_tokens_decoder()
    return frozenset(i for i, token in added.items() if token.special)

  def name_of(self, i: int) -> str:
    """Returns what a token is called."""
    return self._tokenizer.id_to_token(i)

  def save(self, folder: Path) -> None:
    """Writes a `tokenizer.json`, and what a published folder has beside it."""
    (folder / "tokenizer.json").write_text(self.definition, encoding="utf-8")
    roles = {"bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
    roles["mask"] = self.mask_id
    tokens: dict[str, Any] = {
      f"{role}_token": self._tokenizer.id_to_token(i)
      for role, i in roles.items()
      if i is not None and i <= self.last_id
    } | dict(self.named)
    # So that transformers reads the file as it is, not as the network's class.
    tokens["tokenizer_class"] = "PreTrainedTokenizerFast"
    if self.splits_special:
      tokens["split_special_tokens"] = True
    if list(self.chat_templates) == ["default"]:
      tokens["chat_template"] = self.chat_template
    elif self.chat_templates:
      tokens["chat_template"] = [
        {"name": name, "template": template}
        for name, template in self.chat_templates.items()
      ]
    text = json.dumps(tokens, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

  def to_json(self) -> str:
    """Returns the whole tokenizer as JSON."""
    return json.dumps({"kind": "huggingface", **dataclasses.asdict(self)})


def huggingface(path: str, *, mask_token: str | None = None) -> HuggingFace:
  """Returns the tokenizer of a published folder.

  Its special tokens and their roles are read from `tokenizer_config.json`,
  `special_tokens_map.json` and `added_tokens.json` beside it. Only where there
  are no such files is a special token of a usual name what ends a text, pads or
  begins one.

  Args:
    path: a `tokenizer.json`, or the folder that holds it or its parts.
    mask_token: the token that is the mask; None: the `mask_token` of
      `tokenizer_config.json`, or else a new id after the last one.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is something else, or has no such mask token.
  """
  file = paths.place(path)
  file = file / "tokenizer.json" if file.is_dir() else file
  folder = file.parent
  settings = tokenizer_json.read(folder / "tokenizer_config.json")
  tokenizer = tokenizer_json.load(file, path, settings)
  # For batches of other programs; a prompt is neither cut nor filled.
  tokenizer.no_padding()
  tokenizer.no_truncation()
  as_it_is = tokenizer.to_str()
  named, more = tokenizer_json.named_tokens(folder, settings)
  tokenizer_json.add_tokens(
    tokenizer, folder, settings, [*named.values(), *more]
  )
  tokenizer_json.set_surroundings(tokenizer, settings, named)
  definition = tokenizer.to_str()
  if file.is_file() and definition == as_it_is:
    definition = file.read_text("utf-8")
  vocabulary = tokenizer.get_vocab(with_added_tokens=True)
  if mask_token is not None and mask_token not in vocabulary:
    raise ValueError(
      f"{file} has no mask token {mask_token!r}; name one of its tokens, or "
      "None for a new one"
    )
  mask_token = mask_token or named.get("mask_token")
  bare = not settings and not (folder / "special_tokens_map.json").is_file()
  ids = {
    f"{role}_id": vocabulary.get(named.get(f"{role}_token"))
    if not bare
    else _usual(tokenizer, role)
    for role in _USUAL
  }
  return HuggingFace(
    definition=definition,
    mask_id=vocabulary.get(mask_token, max(vocabulary.values()) + 1),
    named=named,
    chat_templates=chats.read_templates(folder),
    splits_special=bool(settings.get("split_special_tokens")),
    tidies_spaces=bool(settings.get("clean_up_tokenization_spaces"))
    and json.loads(definition)["model"].get("type") != "BPE",
    **ids,
  )


def _usual(tokenizer: Any, role: str) -> int | None:
  """Returns the special token that usually has a role, if there is one."""
  special = {
    token.content: i
    for i, token in tokenizer.get_added_tokens_decoder().items()
    if token.special
  }
  return next((special[n] for n in _USUAL[role] if n in special), None)

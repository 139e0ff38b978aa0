"""The `tokenizers` package: a tokenizer as its owners' files mean it.

A `tokenizer.json` is one of several files. Those beside it name tokens that it
lacks, say what stands around a text, and, in older folders, are its parts. What
transformers makes of them (5.24.0, `TokenizersBackend`) is made here.
"""

from collections.abc import Mapping, Sequence
import functools
import json
from typing import Any

import numpy as np

from dllm_jax.core.paths import Path
from dllm_jax.data.byte_pairs import byte_level, QWEN_WORDS

_PARTS = ("vocab.json", "merges.txt")
_BYTE_PAIRS = {
  "GPT2Tokenizer": None,
  "Qwen2Tokenizer": QWEN_WORDS,
  "DreamTokenizer": QWEN_WORDS,
}
# What transformers' classes call their tokens where a file does not.
_OF_CLASS = {
  "GPT2Tokenizer": dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>"),
  "Qwen2Tokenizer": dict.fromkeys(("eos", "unk", "pad"), "<|endoftext|>"),
  "LlamaTokenizer": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
}
_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
# A text longer than a window is encoded window by window, each with a margin on
# both sides: time and memory of one call grow faster than the text.
_WINDOW = 2**20
_MARGIN = 2**12
_AGREED = 32  # tokens in a row that two windows must share to be joined there
_AT_ONCE = 16  # windows


def has_tokenizer(folder: Path) -> bool:
  """Whether a folder holds a tokenizer, or the parts of one."""
  return (folder / "tokenizer.json").is_file() or all(
    (folder / part).is_file() for part in _PARTS
  )


def load(file: Path, path: str, settings: Mapping[str, Any]):
  """Returns the tokenizer of a file, or of the parts beside where it would be.

  Args:
    file: a `tokenizer.json`.
    path: what the caller asked for, for messages.
    settings: the content of `tokenizer_config.json`.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is something else.
  """
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


def _words(folder: Path, settings: Mapping[str, Any]) -> str | None:
  """Returns the expression that cuts words, None for GPT-2's own."""
  kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
  if kind not in _BYTE_PAIRS:
    raise ValueError(
      f"{folder / 'tokenizer_config.json'}: tokenizer_class {kind} is unknown;"
      f" legal without a tokenizer.json: {', '.join(_BYTE_PAIRS)}; or remove"
      f" {_PARTS[0]}, and text is token ids"
    )
  return _BYTE_PAIRS[kind]


def _from_parts(folder: Path, words: str | None):
  """Returns the byte-level tokenizer of a vocabulary and its merges."""
  from tokenizers import models, normalizers  # noqa: PLC0415

  vocabulary, merges = (str(folder / part) for part in _PARTS)
  made = byte_level(models.BPE.from_file(vocabulary, merges), words)
  if words is not None:
    made.normalizer = normalizers.NFC()
  return made


def read(path: Path) -> dict[str, Any]:
  """Returns a JSON object, empty where there is no file.

  Raises:
    ValueError: the file holds something else.
  """
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


def _text_of(token: Any) -> str | None:
  """Returns the text of a token as files write it, None if it is none."""
  token = token.get("content") if isinstance(token, Mapping) else token
  return token if isinstance(token, str) else None


def named_tokens(
  folder: Path, settings: Mapping[str, Any]
) -> tuple[dict[str, str], list[str]]:
  """Returns the special tokens that files name, by name, and those without one.

  A null is a word: there is none, whatever the class or another file says.
  """
  kind = str(settings.get("tokenizer_class")).removesuffix("Fast")
  given: dict[str, Any] = {
    f"{role}_token": token for role, token in _OF_CLASS.get(kind, {}).items()
  }
  given |= settings
  if "added_tokens_decoder" not in settings:  # else the map is not read
    given |= read(folder / "special_tokens_map.json")
  extra = given.get("extra_special_tokens")
  extra = given.get("additional_special_tokens") if extra is None else extra
  for part in ("model_specific_special_tokens", extra):
    part = given.get(part) if isinstance(part, str) else part
    given |= part if isinstance(part, Mapping) else {}
  names = [f"{role}_token" for role in _ROLES]
  names += [
    key
    for key in given
    if key.endswith("_token")
    and not key.startswith("add_")
    or isinstance(extra, Mapping)
    and key in extra
  ]
  found = {name: _text_of(given.get(name)) for name in names}
  more = extra if isinstance(extra, list) else []
  texts = [_text_of(token) for token in more]
  return (
    {name: text for name, text in found.items() if text is not None},
    [text for text in texts if text is not None],
  )


def add_tokens(
  tokenizer: Any,
  folder: Path,
  settings: Mapping[str, Any],
  named: Sequence[str],
) -> None:
  """Adds the tokens that only the files beside a tokenizer name.

  Args:
    tokenizer: what they are added to.
    folder: where the files are.
    settings: the content of `tokenizer_config.json`.
    named: special tokens that have no id there: they follow the last one.

  Raises:
    ValueError: one would get another id than the files say.
  """
  import tokenizers  # noqa: PLC0415

  listed = {
    int(i): dict(token)
    for i, token in settings.get("added_tokens_decoder", {}).items()
  }
  for text, i in read(folder / "added_tokens.json").items():
    listed.setdefault(i, {"content": text, "special": True})
  known = set(tokenizer.get_vocab(with_added_tokens=True))
  for i, token in sorted(listed.items()):
    text = token["content"]
    if text not in known:
      options = {name: token[name] for name in _FLAGS if name in token}
      special = token.get("special", True)
      added = tokenizers.AddedToken(text, special=special, **options)
      add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
      add([added])
    if tokenizer.token_to_id(text) != i:
      raise ValueError(
        f"{folder}: token {text!r} is {tokenizer.token_to_id(text)}, but the"
        f" files beside the tokenizer say {i}; they belong to different models"
      )
  known |= {token["content"] for token in listed.values()}
  tokenizer.add_special_tokens([text for text in named if text not in known])


def set_surroundings(
  tokenizer: Any, settings: Mapping[str, Any], named: Mapping[str, str]
) -> None:
  """Adds to what stands around a text what `tokenizer_config.json` asks for.

  `add_bos_token` and `add_eos_token` add their token where the post-processor of
  `tokenizer.json` does not. Deviates: transformers before 5 reads them so for
  LLaMA's class, 5.24.0 only where there is no `tokenizer.json`.

  Args:
    tokenizer: what is changed.
    settings: the content of `tokenizer_config.json`.
    named: special tokens by role.
  """
  from tokenizers import processors  # noqa: PLC0415

  begin, after = (list(ids) for ids in surroundings(tokenizer))
  ids = {
    role: tokenizer.token_to_id(named[f"{role}_token"])
    for role in ("bos", "eos")
    if settings.get(f"add_{role}_token") and f"{role}_token" in named
  }
  wanted_begin, wanted_after = list(begin), list(after)
  if "bos" in ids and ids["bos"] not in begin:
    wanted_begin.insert(0, ids["bos"])
  if "eos" in ids and ids["eos"] not in after:
    wanted_after.append(ids["eos"])
  if (wanted_begin, wanted_after) == (begin, after):
    return
  name = tokenizer.id_to_token
  tokenizer.post_processor = processors.TemplateProcessing(
    single=[*map(name, wanted_begin), "$A", *map(name, wanted_after)],
    special_tokens=[(name(i), i) for i in {*wanted_begin, *wanted_after}],
  )


def surroundings(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns the ids that the post-processor puts before and after every text."""
  for probe in ("a", "0", "."):
    made = tokenizer.encode(probe)
    text = [i for i, extra in enumerate(made.special_tokens_mask) if not extra]
    if text:
      return tuple(made.ids[: text[0]]), tuple(made.ids[text[-1] + 1 :])
  return tuple(tokenizer.encode("").ids), ()


def encode(tokenizer: Any, text: str) -> np.ndarray:
  """Returns the int32 ids of a text of any length, without what is around it.

  A long text is cut in windows, which are joined where both have the same
  tokens, so that its ids are those of the whole.
  """
  return encode_batch(tokenizer, [text])[0]


def encode_batch(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
  """Returns `encode` of each text."""
  short = [text for text in texts if _is_short(text)]
  found = iter(_at_once(tokenizer, short))
  return [
    next(found) if _is_short(text) else _encode_long(tokenizer, text)
    for text in texts
  ]


def places(
  tokenizer: Any, texts: Sequence[str]
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Returns (int32 ids `[n]`, places `[n, 2]`) of texts, each tokenised as a whole.

  A place is where a token begins and ends in its text, in characters, of whatever
  the tokenizer made of the text before it cut it. What some leave out of a place,
  spaces, lies between it and the one before: a token of spaces alone has that.
  """
  found = []
  for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
    at = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
    before = np.maximum.accumulate(np.append(0, at[:-1, 1])) if len(at) else at
    empty = at[:, 0] >= at[:, 1]
    at[empty, 0] = np.minimum(before[empty], at[empty, 1])
    found.append((np.asarray(encoding.ids, np.int32), at))
  return found


def _is_short(text: str) -> bool:
  return len(text) <= _WINDOW + 2 * _MARGIN


def _encode_long(tokenizer: Any, text: str) -> np.ndarray:
  margin = _MARGIN
  while margin < _WINDOW // 2:
    found = _windows(tokenizer, text, margin)
    if found is not None:
      return found
    margin *= 8
  return _at_once(tokenizer, [text])[0]


def _at_once(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
  encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
  return [np.array(encoding.ids, np.int32) for encoding in encodings]


def _windows(tokenizer, text: str, margin: int) -> np.ndarray | None:
  """Returns the ids of a text from windows, None if two cannot be joined."""
  starts = range(0, len(text), _WINDOW)
  found, before = [], None
  for first in range(0, len(starts), _AT_ONCE):
    some = starts[first : first + _AT_ONCE]
    bounds = [(max(s - margin, 0), s + _WINDOW + margin) for s in some]
    parts = [text[a:b] for a, b in bounds]
    encodings = tokenizer.encode_batch(parts, add_special_tokens=False)
    for start, (low, _), encoding in zip(some, bounds, encodings, strict=True):
      here = _Window(encoding, low)
      if before is not None:
        joint = before.join(here, start, margin)
        if joint is None:
          return None
        found.append(before.ids[before.used : joint[0]])
        here.used = joint[1]
      before = here
  return np.concatenate([*found, before.ids[before.used :]])


class _Window:
  """The tokens of a part of a text.

  Attributes:
    ids: its tokens.
    used: the tokens before, which another window has.
  """

  def __init__(self, encoding: Any, low: int):
    self._encoding, self._low = encoding, low
    self.ids, self.used = np.asarray(encoding.ids, np.int32), 0

  def _between(self, start: int, stop: int) -> list[tuple[int, int, int]]:
    """Returns (place in the text, id, number) of the tokens in a range."""
    places = self._places
    inside = np.flatnonzero((places >= start) & (places < stop))
    return [(int(places[i]), int(self.ids[i]), int(i)) for i in inside]

  @functools.cached_property
  def _places(self) -> np.ndarray:
    """Where each token begins in the text; slow to ask for, so once."""
    return np.asarray([a for a, _ in self._encoding.offsets]) + self._low

  def join(self, other: "_Window", place: int, margin: int):
    """Returns the tokens of this one and of a later one that are at one place.

    The middle of the run of equal tokens that is nearest to `place`; None where
    no run is long enough.
    """
    mine = self._between(place - margin, place + margin)
    theirs = other._between(place - margin, place + margin)
    at = {(where, token): n for n, (where, token, _) in enumerate(theirs)}
    order = range(len(mine) - _AGREED + 1)
    middle = _AGREED // 2
    for n in sorted(order, key=lambda n: abs(mine[n + middle][0] - place)):
      m = at.get(mine[n][:2])
      if m is None or m + _AGREED > len(theirs):
        continue
      run = zip(mine[n : n + _AGREED], theirs[m : m + _AGREED], strict=True)
      if all(a[:2] == b[:2] for a, b in run):
        return mine[n + middle][2], theirs[m + middle][2]
    return None

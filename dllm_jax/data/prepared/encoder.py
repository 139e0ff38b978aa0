"""Documents to ids, many at a time, each English word only once.

Byte-level tokenizers cut a text into words by an expression, and spell each by
itself. Where the expression is one of those below, a space and the ASCII letters
after it are a word whatever stands around, and what lies between two such words
is cut as if it stood alone:

    "He said,  'hello there'"  ->  "He" " said" ",  'hello" " there" "'"

So these parts are spelled by the tokenizer when they are met first, and looked
up from then on: several times as fast as spelling all. Other tokenizers spell
whole documents.
"""

from collections.abc import Sequence
import itertools
import json
import re
from typing import Any

import numpy as np

from dllm_jax.data import byte_pairs, source
from dllm_jax.data import packing as packing_lib
from dllm_jax.data.huggingface import HuggingFace
from dllm_jax.data.tokenizer import Tokenizer

# Not before another letter, nor before what is not ASCII: that could be a
# letter, or become one with the last by normalisation.
_PARTS = re.compile(r"( [A-Za-z]+)(?![A-Za-z\x80-\U0010ffff])")
# Added tokens that could begin, end or go on inside such a word.
_INSIDE = re.compile(r"^[A-Za-z]| [A-Za-z]| $")
_EXPRESSIONS = (
  *byte_pairs.EXPRESSIONS,
  # Llama 3's.
  byte_pairs.QWEN_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),
)
_KEPT = 2**18  # parts that are remembered,
_KEPT_CHARACTERS = 24  # if they are no longer than this
_LONG = 2**16


class Encoder:
  """The ids of documents: `packing.tokenise` of each, many at a time.

  Args:
    tokenizer: the tokenizer.
  """

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    end = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
    around = tokenizer.begin_ids, tokenizer.after_ids or end
    self._before, self._after = (np.asarray(ids, np.int32) for ids in around)
    self._encode_batch = tokenizer.encode_batch
    if _is_cut_at_words(tokenizer):
      self._encode_batch = Words(tokenizer)

  def __call__(self, documents: Sequence[source.Document]) -> list[np.ndarray]:
    """Returns the int32 ids of each document.

    Raises:
      ValueError: one cannot be encoded; the message names the file.
    """
    try:
      found = self._encode_batch([d.text for d in documents])
    except (ValueError, TypeError):  # Which one it is, is found one by one.
      return [self._alone(document) for document in documents]
    return [np.concatenate([self._before, i, self._after]) for i in found]

  def _alone(self, document: source.Document) -> np.ndarray:
    try:
      return packing_lib.tokenise(document.text, document.path, self._tokenizer)
    except TypeError as error:  # What tokenizers say to it.
      raise ValueError(
        f"{document.path}: a text has half a character in it (a surrogate "
        "without its pair, such as \\ud800); remove it"
      ) from error


class Words:
  """The ids of texts that are cut at words: the tokenizer's own.

  Args:
    tokenizer: a tokenizer that spells each word by itself.
  """

  def __init__(self, tokenizer: HuggingFace):
    self._tokenizer = tokenizer
    self._known: dict[str, list[int]] = {"": []}

  def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the int32 ids of each text."""
    cut = [_PARTS.split(text) for text in texts]
    # Writing without spaces is not cut: what is long is not to be kept.
    cut = [c if max(map(len, c)) < _LONG else None for c in cut]
    parts = itertools.chain.from_iterable(filter(None, cut))
    new = list(set(parts).difference(self._known))
    self._known.update(zip(new, self._tokenizer.spell(new), strict=True))
    ids = list(map(self._encode, texts, cut))
    if len(self._known) > _KEPT:
      self._known = {"": []}
    for part in new:
      if len(part) > _KEPT_CHARACTERS:
        self._known.pop(part, None)
    return ids

  def _encode(self, text: str, parts: list[str] | None) -> np.ndarray:
    if parts is None:
      return self._tokenizer.encode(text)
    found = map(self._known.__getitem__, parts)
    ids = np.fromiter(itertools.chain.from_iterable(found), np.int32)
    if (ids == self._tokenizer.mask_id).any():
      return self._tokenizer.encode(text)
    return ids


def _is_cut_at_words(tokenizer: Tokenizer) -> bool:
  """Whether `Words` is right for a tokenizer."""
  if not isinstance(tokenizer, HuggingFace):
    return False
  fields = json.loads(tokenizer.definition)
  return (
    _normalizer(fields) in (None, "NFC")
    and _cuts_words(fields.get("pre_tokenizer") or {})
    and fields["model"].get("type") == "BPE"
    and not fields["model"].get("dropout")
    and not any(
      _INSIDE.search(token["content"])
      or any(token.get(k) for k in ("lstrip", "rstrip", "single_word"))
      for token in fields.get("added_tokens") or ()
    )
  )


def _normalizer(fields: dict[str, Any]) -> str | None:
  return (fields.get("normalizer") or {"type": None})["type"]


def _cuts_words(pre: dict[str, Any]) -> bool:
  if pre.get("type") == "ByteLevel":
    return not pre.get("add_prefix_space", True) and pre.get("use_regex", True)
  if pre.get("type") != "Sequence" or len(pre["pretokenizers"]) != 2:
    return False
  split, level = pre["pretokenizers"]
  return (
    split.get("type") == "Split"
    and split["pattern"].get("Regex") in _EXPRESSIONS
    and split["behavior"] == "Isolated"
    and not split["invert"]
    and level.get("type") == "ByteLevel"
    and not level.get("add_prefix_space", True)
    and not level.get("use_regex", True)
  )

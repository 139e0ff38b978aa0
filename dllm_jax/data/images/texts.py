"""The text half of a joined vocabulary: a tokenizer with MMaDA's marks.

A tokenizer of LLaDA's has them already, as reserved tokens; any other gets them
behind its own, and image tokens after those.
"""

import dataclasses
from typing import Any

from dllm_jax.core.images import ImageVocabulary
from dllm_jax.data.huggingface import HuggingFace

CHAT = (
  "{{ '<|startoftext|>' }}{% for message in messages %}"
  "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n'"
  " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
  "{% if add_generation_prompt %}"
  "{{ '<|start_header_id|>assistant<|end_header_id|>\n' }}{% endif %}"
)
"""MMaDA's chat template: one newline after a header, where LLaDA's has two."""

_MARKS = {
  "begin": "<|startoftext|>",
  "end": "<|endoftext|>",
  "start_header": "<|start_header_id|>",
  "end_header": "<|end_header_id|>",
  "end_turn": "<|eot_id|>",
  "start_image": "<|soi|>",
  "end_image": "<|eoi|>",
  "to_image": "<|t2i|>",
  "understand": "<|mmu|>",
  "pad": "[iPAD]",
  "reason": "<|r2i|>",
  "mask": "<|mdm_mask|>",
}
_LLADA = 126349
"""Tokens of LLaDA's tokenizer, whose table has 126464 rows."""
_ROWS = 126464


def joined(text: HuggingFace, *, codes: int, tokens: int) -> HuggingFace:
  """Returns a tokenizer whose vocabulary has images.

  Args:
    text: that of text.
    codes: codes of the image tokenizer.
    tokens: image tokens of a picture.
  """
  made: Any = text._tokenizer  # noqa: SLF001  A copy follows.
  if is_llada(text):
    vocabulary = ImageVocabulary(codes=codes, tokens=tokens)
    turn = made.token_to_id("<|eot_id|>")
    return dataclasses.replace(
      text,
      images=vocabulary,
      size=_ROWS + codes,
      end_ids=(vocabulary.end, turn),
      chat_templates={"default": CHAT},
    )
  made = type(made).from_str(text.definition)
  made.add_special_tokens(list(_MARKS.values()))
  ids = {name: made.token_to_id(word) for name, word in _MARKS.items()}
  offset = max(made.get_vocab(with_added_tokens=True).values()) + 1
  own = {f.name for f in dataclasses.fields(ImageVocabulary)} & ids.keys()
  vocabulary = ImageVocabulary(
    offset=offset, codes=codes, tokens=tokens, **{n: ids[n] for n in own}
  )
  return HuggingFace(
    definition=made.to_str(),
    mask_id=ids["mask"],
    pad_id=ids["end"],
    eos_id=ids["end"],
    bos_id=ids["begin"],
    end_ids=(ids["end"], ids["end_turn"]),
    size=vocabulary.stop,
    named={"bos_token": _MARKS["begin"], "eos_token": _MARKS["end"]},
    chat_templates={"default": CHAT},
    images=vocabulary,
  )


def is_llada(text: HuggingFace) -> bool:
  """Whether a tokenizer has LLaDA's table, in which MMaDA's marks have places."""
  header = text._tokenizer.token_to_id("<|end_header_id|>")  # noqa: SLF001
  return header == ImageVocabulary().end_header and text.last_id + 1 == _LLADA

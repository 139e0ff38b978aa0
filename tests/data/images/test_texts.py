"""Image tokens behind those of text: LLaDA's table, and any other."""

import json

import pytest
import tokenizers

from dllm_jax import data
from dllm_jax.core.images import ImageVocabulary
from dllm_jax.data import HuggingFace
from dllm_jax.data.images import joined


def words(named, size):
  """Returns a tokenizer of words with some at given places."""
  vocabulary = {f"w{i}": i for i in range(size) if i not in named}
  vocabulary |= {word: i for i, word in named.items()}
  made = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocabulary, unk_token="w0")
  )
  made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  made.add_special_tokens(list(named.values()))
  return made.to_str()


@pytest.fixture(scope="module")
def llada():
  """As many tokens as LLaDA's, those with a meaning in their places."""
  named = {
    126080: "<|startoftext|>", 126081: "<|endoftext|>",
    126336: "<|mdm_mask|>", 126346: "<|start_header_id|>",
    126347: "<|end_header_id|>", 126348: "<|eot_id|>",
  }  # fmt: skip
  return HuggingFace(
    definition=words(named, 126349), mask_id=126336, eos_id=126081
  )


@pytest.mark.all
def test_published_places(llada):
  """Image tokens begin at the tokenizer's length, in LLaDA's spare rows."""
  made = joined(llada, codes=8192, tokens=1024)
  assert made.images == ImageVocabulary()
  assert made.vocab_size == 134656 and made.images.stop == 134541
  assert made.mask_id == 126336 and made.end_ids == (126081, 126348)
  text = made.render([{"role": "user", "content": " w1 w2 "}], answer=True)
  assert text == (
    "<|startoftext|><|start_header_id|>user<|end_header_id|>\nw1 w2<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n"
  )
  assert made.encode("<|startoftext|>").tolist() == [126080]


def test_other_tokenizers_get_marks():
  text = HuggingFace(definition=words({}, 50), mask_id=50)
  made = joined(text, codes=16, tokens=4)
  v = made.images
  assert v.offset == 62 and v.stop == made.vocab_size == 78
  marks = {v.begin, v.end, v.start_image, v.end_image, v.to_image, v.understand,
           v.pad, v.reason, v.end_header, made.mask_id}  # fmt: skip
  assert len(marks) == 10 and min(marks) == 50 and max(marks) < v.offset
  assert joined(made, codes=16, tokens=4) == made  # once is enough
  again = data.tokenizer_from_json(made.to_json())
  assert again == made and json.loads(made.to_json())["images"]["codes"] == 16

"""Tokenizers of published folders, new and old."""

import json

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from dllm_jax.data.huggingface import huggingface
from tests.data.test_chat import folder


def write(path, **fields):
  path.write_text(json.dumps(fields))


def test_roles_in_a_file_of_their_own(tmp_path):
  folder(tmp_path)  # names <s> and <|mask|> in its config
  write(
    tmp_path / "special_tokens_map.json",
    eos_token={"content": "<|end|>"},
    bos_token="a",
  )
  tokenizer = huggingface(str(tmp_path))
  # As transformers 5.24.0: the map is read last, unless there is a decoder.
  assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.mask_id) == (6, 0, 7)


def test_tokens_beside_the_tokenizer(tmp_path):
  decoder = {"8": {"content": "<|m|>", "special": True, "lstrip": False}}
  folder(tmp_path, mask_token="<|m|>", added_tokens_decoder=decoder)
  write(tmp_path / "added_tokens.json", **{"<|x|>": 9, "<|end|>": 6})
  tokenizer = huggingface(str(tmp_path))
  assert tokenizer.mask_id == 8 and tokenizer.last_id == 9
  assert 8 not in tokenizer.encode("<|m|>")  # text stays text
  write(tmp_path / "added_tokens.json", **{"<|x|>": 12})
  with pytest.raises(ValueError, match="'<|x|>' is 9, but .* say 12"):
    huggingface(str(tmp_path))
  # Without anything to add, the definition is the file's own text.
  folder(tmp_path)
  (tmp_path / "added_tokens.json").unlink()
  text = (tmp_path / "tokenizer.json").read_text()
  assert huggingface(str(tmp_path)).definition == text


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "DreamTokenizer"])
def test_a_vocabulary_and_its_merges(kind, tmp_path):
  letters = sorted(pre_tokenizers.ByteLevel.alphabet())
  words = [*letters, "th", "the", "Ġthe", "12"]
  write(tmp_path / "vocab.json", **{w: i for i, w in enumerate(words)})
  merges = "#version: 0.2\nt h\nth e\nĠ the\n1 2\n"
  (tmp_path / "merges.txt").write_text(merges)
  decoder = {"260": {"content": "<|mask|>", "special": True}}
  fields = {"mask_token": "<|mask|>", "added_tokens_decoder": decoder}
  write(tmp_path / "tokenizer_config.json", tokenizer_class=kind, **fields)
  tokenizer = huggingface(str(tmp_path))
  assert tokenizer.mask_id == 260
  ids = tokenizer.encode("the the\n12é")
  assert tokenizer.decode(ids) == "the the\n12é"
  named = [words[i] for i in ids[:2]]
  assert named == ["the", "Ġthe"]
  # Qwen's words have one digit each; GPT-2's have many.
  assert (words.index("12") in ids) == (kind == "GPT2Tokenizer")

  tokenizer.save(tmp_path)
  again = huggingface(str(tmp_path))
  np.testing.assert_array_equal(
    again.encode("the 12"), tokenizer.encode("the 12")
  )
  assert again.mask_id == 260
  (tmp_path / "tokenizer.json").unlink()
  write(tmp_path / "tokenizer_config.json", tokenizer_class="Mine")
  with pytest.raises(
    ValueError, match="tokenizer_class Mine is unknown; legal"
  ):
    huggingface(str(tmp_path))

"""What stands before and after a text: the tokenizer's own files say it."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from dllm_jax.data.huggingface import huggingface
from dllm_jax.data.packing import tokenise


def write(folder, *, single=None, ordinary=False, **config):
  """Writes a tokenizer of words whose post-processor is a template."""
  words = {w: i for i, w in enumerate(["a", "b", "c", "<unk>", "<s>"])}
  made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  special = ["<|endoftext|>"] if ordinary else ["<s>", "<|endoftext|>"]
  made.add_special_tokens(special)
  if single is not None:
    made.post_processor = processors.TemplateProcessing(
      single=single, special_tokens=[("<s>", 4), ("<|endoftext|>", 5)]
    )
  folder.mkdir(exist_ok=True)
  made.enable_truncation(2)
  made.enable_padding(length=9, pad_id=3, pad_token="<unk>")
  made.save(str(folder / "tokenizer.json"))
  if config:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return huggingface(str(folder))


# olafurjohannsson/kjarni issue 50 and its like: a beginning that nobody wrote.
@pytest.mark.parametrize(
  ("single", "config", "begin"),
  [
    (None, {"bos_token": None}, ()),
    (None, {"bos_token": None, "add_bos_token": True}, ()),
    (None, {"bos_token": "<s>"}, ()),
    (None, {"bos_token": "<s>", "add_bos_token": False}, ()),
    (None, {"bos_token": "<s>", "add_bos_token": True}, (4,)),
    (["<s>", "$A"], {"bos_token": "<s>"}, (4,)),
    (["<s>", "$A"], {"bos_token": "<s>", "add_bos_token": True}, (4,)),
    (["<s>", "$A"], {}, (4,)),
    (["$A", "<|endoftext|>"], {"eos_token": "<|endoftext|>"}, ()),
    (["<s>", "<s>", "$A"], {"bos_token": "<s>"}, (4, 4)),
  ],
  ids=str,
)
def test_prompts_begin_as_their_tokenizer_has_it(
  single, config, begin, tmp_path
):
  tokenizer = write(tmp_path / "t", single=single, **config)
  assert tokenizer.begin_ids == begin
  # The padding and truncation of the file are for batches of other programs.
  np.testing.assert_array_equal(tokenizer.prompt("a b c"), [*begin, 0, 1, 2])
  np.testing.assert_array_equal(tokenizer.encode("a b c"), [0, 1, 2])
  spans = tokenizer.encode_spans(["a ", 2, " c"])
  assert spans == [*begin, 0, None, None, 2, *tokenizer.after_ids]


def test_documents_begin_and_end_once(tmp_path):
  one = write(
    tmp_path / "1",
    single=["<s>", "$A", "<|endoftext|>"],
    bos_token="<s>",
    eos_token="<|endoftext|>",
  )
  np.testing.assert_array_equal(tokenise("a b", "x", one), [4, 0, 1, 5])
  two = write(tmp_path / "2", eos_token="<|endoftext|>", add_eos_token=True)
  np.testing.assert_array_equal(tokenise("a b", "x", two), [0, 1, 5])
  three = write(tmp_path / "3", eos_token="<|endoftext|>")
  np.testing.assert_array_equal(tokenise("a b", "x", three), [0, 1, 5])


def test_an_ordinary_word_has_no_role(tmp_path):
  tokenizer = write(
    tmp_path / "t", ordinary=True, bos_token=None, eos_token="<|endoftext|>"
  )
  assert tokenizer.bos_id is None and tokenizer.eos_id == 5
  # Without files that say it, usual names count, of special tokens only.
  assert write(tmp_path / "u", ordinary=True).bos_id is None
  bare = write(tmp_path / "v")
  assert (bare.bos_id, bare.eos_id, bare.begin_ids) == (4, 5, ())


def test_end_ids_are_what_the_model_says(tmp_path):
  tokenizer = write(tmp_path / "t", eos_token="<|endoftext|>")
  assert tokenizer.end_ids == (5,)


def test_decoding_knows_what_stands_before(tmp_path):
  """Pieces around masks keep their spaces (decoders that look at neighbours)."""
  words = {w: i for i, w in enumerate(["▁to", "▁be", "or", "<unk>", "<m>"])}
  made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
  made.decoder = tokenizers.decoders.Metaspace(
    replacement="▁", prepend_scheme="always"
  )
  made.add_special_tokens(["<m>"])
  made.save(str(tmp_path / "tokenizer.json"))
  tokenizer = huggingface(str(tmp_path), mask_token="<m>")
  assert tokenizer.decode([0, 1]) == "to be"
  assert tokenizer.decode([0, 4, 4, 1, 2], mask="_") == "to__ beor"


# transformers 5 folders: tokens that only `tokenizer_config.json` names.
@pytest.mark.parametrize(
  "extra",
  [
    {"extra_special_tokens": ["<|x|>"]},
    {"additional_special_tokens": ["<|x|>"]},
    {"extra_special_tokens": {"image_token": "<|x|>"}},
    {"image_token": "<|x|>"},
    {"added_tokens_decoder": {"6": {"content": "<|x|>", "special": True}}},
  ],
  ids=str,
)
def test_tokens_that_only_the_config_names(extra, tmp_path):
  template = "{{ image_token }}{{ messages[0].content }}"
  tokenizer = write(
    tmp_path / "t",
    tokenizer_class="TokenizersBackend",
    chat_template=template,
    **extra,
  )
  np.testing.assert_array_equal(tokenizer.encode("a <|x|>"), [0, 6])
  named = "image_token" in str(extra)
  text = tokenizer.render([{"role": "user", "content": "b"}])
  assert text == ("<|x|>b" if named else "b")

"""Chat templates: what they render, what they may not do."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from dllm_jax.data import chat, tokenizer_from_json
from dllm_jax.data.tokenizer import huggingface

TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
  "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TALK = [
  {"role": "user", "content": "a b"},
  {"role": "assistant", "content": "b"},
]


def folder(path, **config):
  words = {w: i for i, w in enumerate(["a", "b", "<unk>"])}
  made = tokenizers.Tokenizer(models.WordLevel(words, unk_token="<unk>"))
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  made.add_special_tokens([
    "<s>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|mask|>",
  ])
  made.save(str(path / "tokenizer.json"))
  config = {"bos_token": "<s>", "mask_token": "<|mask|>"} | config
  (path / "tokenizer_config.json").write_text(json.dumps(config))
  return str(path)


def test_special_tokens_of_a_template_are_tokens(tmp_path):
  tokenizer = huggingface(folder(tmp_path, chat_template=TEMPLATE))
  ids = tokenizer.chat(TALK)
  np.testing.assert_array_equal(ids, [3, 4, 0, 1, 6, 5, 1, 6, 5])
  np.testing.assert_array_equal(tokenizer.chat(TALK, answer=False), ids[:-1])
  again = tokenizer_from_json(tokenizer.to_json())
  np.testing.assert_array_equal(again.chat(TALK), ids)
  # As transformers reads them, in any text; the mask's name is no mask.
  np.testing.assert_array_equal(tokenizer.encode("<|user|>a"), [4, 0])
  assert 7 not in tokenizer.encode("a <|mask|> b")


def test_named_templates_and_a_file_of_its_own(tmp_path):
  named = [
    {"name": "tool", "template": "x"},
    {"name": "default", "template": "y"},
  ]
  folder(tmp_path, chat_template=named)
  named = chat.read_templates(tmp_path)
  assert named == {"tool": "x", "default": "y"}
  assert chat.choose(named) == "y" and chat.choose(named, name="tool") == "x"
  (tmp_path / "chat_template.jinja").write_text("z")
  more = tmp_path / "additional_chat_templates"
  more.mkdir()
  (more / "tool_use.jinja").write_text("t")
  named = chat.read_templates(tmp_path)
  assert named == {"default": "z", "tool_use": "t"}
  assert chat.choose(named) == "z" and chat.choose(named, tools=[]) == "t"
  with pytest.raises(ValueError, match="no chat template 'rag'; legal"):
    chat.choose(named, name="rag")


def test_no_template(tmp_path):
  tokenizer = huggingface(folder(tmp_path))
  with pytest.raises(ValueError, match="has no chat template"):
    tokenizer.chat(TALK)


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception('roles must alternate') }}",
    "{% for %}",
    "{{ 1 / 0 }}",
])  # fmt: skip
def test_templates_are_kept_in(template):
  with pytest.raises(ValueError, match="refuses these messages") as error:
    chat.render(template, TALK)
  assert "\n" not in str(error.value)


def test_messages_need_role_and_content():
  with pytest.raises(ValueError, match="role and a content"):
    chat.render("x", [{"role": "user"}])

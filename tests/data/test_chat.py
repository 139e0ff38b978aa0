"""Chat templates: what they render, what they may not do."""

import datetime
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


# What transformers 5.24.0 gives a template besides plain Jinja.
@pytest.mark.parametrize(
  ("template", "options", "expected"),
  [
    ("{% generation %}x{% endgeneration %}", {}, "x"),
    ("{%- generation -%} x {%- endgeneration -%}", {}, "x"),
    (
      "{{ {'b': 1, 'a': [1, 2]} | tojson(separators=(',', ':')) }}",
      {},
      '{"b":1,"a":[1,2]}',
    ),
    ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }}", {}, '{"a": 2, "b": 1}'),
    ("{{ 'ä<' | tojson }}", {}, '"ä<"'),
    ("{{ 'ä' | tojson(ensure_ascii=true) }}", {}, '"\\u00e4"'),
    ("{{ [1] | tojson(indent=2) }}", {}, "[\n  1\n]"),
    ("{{ tools is none }}{{ documents is none }}", {}, "TrueTrue"),
    ("{{ tools[0].name }}", {"tools": [{"name": "add"}]}, "add"),
    ("{{ documents | length }}", {"documents": [{}, {}]}, "2"),
    ("{{ enable_thinking }}", {"enable_thinking": False}, "False"),
    ("{{ messages[0].content[0].text }}", {}, "a"),  # parts of a content
    ("{{ messages[1].reasoning_content }}", {}, "why"),
    ("{{ 'content' in messages[2] }}", {}, "False"),  # null, which is nothing
    ("{% for m in messages %}{% break %}{% endfor %}x", {}, "x"),
  ],
)
def test_the_environment_of_templates(template, options, expected):
  talk = [
    {"role": "user", "content": [{"type": "text", "text": "a"}]},
    {"role": "assistant", "content": "b", "thinking": "why"},
    {"role": "assistant", "content": None, "tool_calls": []},
  ]
  assert chat.render(template, talk, **options).text == expected


def test_a_template_may_ask_for_the_date():
  now = datetime.datetime.now()
  text = chat.render("{{ strftime_now('%Y-%m-%d') }}", TALK).text
  assert text in {now.date().isoformat(), datetime.date.today().isoformat()}


@pytest.mark.parametrize(
  "template",
  [
    "{{ 1 | tojson(nonsense=2) }}",
    "{{ strftime_now() }}",
    "{% generation %}never closed",
    "{{ messages[9].content }}",
  ],
)
def test_what_a_template_may_not_is_one_line(template):
  with pytest.raises(ValueError, match="refuses these messages") as error:
    chat.render(template, TALK)
  assert "\n" not in str(error.value)


# huggingface/transformers pull request 33198 (`continue_final_message`).
@pytest.mark.parametrize(
  ("content", "expected"),
  [
    ("b", "<|user|>a b<|end|><|assistant|>b"),
    ("b \n", "<|user|>a b<|end|><|assistant|>b \n"),
    ("", "<|user|>a b<|end|><|assistant|>"),
    ("<|end|>b", "<|user|>a b<|end|><|assistant|><|end|>b"),
  ],
)
def test_the_last_message_goes_on(content, expected):
  talk = [*TALK[:1], {"role": "assistant", "content": content}]
  assert chat.render(TEMPLATE, talk, continued=True).text == expected
  trims = TEMPLATE.replace("m['content']", "m['content'] | trim")
  if content.strip():
    found = chat.render(trims, talk, continued=True).text
    assert found == expected.rstrip()


def test_what_cannot_go_on_is_told():
  tool = [*TALK[:1], {"role": "assistant", "tool_calls": [{"name": "x"}]}]
  with pytest.raises(ValueError, match="has no text that could go on"):
    chat.render(TEMPLATE, tool, continued=True)
  with pytest.raises(ValueError, match="leaves out the end"):
    chat.render("{{ messages[0].content }}", TALK, continued=True)
  with pytest.raises(ValueError, match="at least one message"):
    chat.render(TEMPLATE, [])


def test_templates_have_all_named_tokens(tmp_path):
  template = "{{ unk_token }}|{{ mask_token }}|{{ pad_token }}|{{ sep_token }}"
  given = {"unk_token": "<unk>", "sep_token": "b", "chat_template": template}
  tokenizer = huggingface(folder(tmp_path, **given))
  assert tokenizer.render(TALK) == "<unk>|<|mask|>||b"
  again = tokenizer_from_json(tokenizer.to_json())
  assert again == tokenizer and again.render(TALK) == tokenizer.render(TALK)

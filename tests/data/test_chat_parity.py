"""Conversations through templates, token for token as transformers 5.24.0.

The templates are ours, in the forms of Qwen2.5, Qwen3, LLaMA 3, Gemma, LLaDA,
Dream, SDAR, SmolLM3, Mistral and Phi-4: with tools and documents, parts of
contents, thoughts, `{% generation %}`, what is refused and what goes on.
"""

import json
import shutil

import numpy as np
import pytest

from dllm_jax.data import chat
from dllm_jax.data.huggingface import huggingface
from tests import golden_cases

CASE = golden_cases.present("chat_templates")
NAMES = list(golden_cases.load(CASE[0]).config["templates"]) if CASE else []


@pytest.fixture(scope="module")
def recorded():
  return golden_cases.load(CASE[0])


@pytest.fixture(params=NAMES)
def published(request, recorded, tmp_path):
  """Returns the name of a template, and the tokenizer of its folder."""
  given = recorded.config["templates"][request.param]
  root = golden_cases.ROOT / CASE[0]
  shutil.copyfile(root / "tokenizer.json", tmp_path / "tokenizer.json")
  config = given["tokenizer_config"] | {"chat_template": given["template"]}
  (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
  return request.param, huggingface(str(tmp_path))


def _options(talk):
  return {
    "answer": talk["add_generation_prompt"],
    "continued": talk.get("continue_final_message", False),
    "tools": talk.get("tools"),
    "documents": talk.get("documents"),
    **talk["variables"],
  }


def test_conversations_get_the_recorded_ids(published, recorded):
  name, tokenizer = published
  parts = np.split(
    recorded.arrays[f"{name}_ids"], recorded.arrays[f"{name}_ends"][:-1]
  )
  refused = 0
  for talk, expected in zip(recorded.config["talks"], parts, strict=True):
    if expected.tolist() == [-1]:
      refused += 1
      with pytest.raises(ValueError, match="template|go on"):
        tokenizer.chat(talk["messages"], **_options(talk))
      continue
    ids = tokenizer.chat(talk["messages"], **_options(talk))
    np.testing.assert_array_equal(ids, expected, err_msg=str(talk))
  assert refused == recorded.config["refused"][name] < len(parts)


def test_what_a_model_is_to_learn_is_where_it_was_recorded(published, recorded):
  name, tokenizer = published
  spans, ends = (
    recorded.arrays[f"{name}_{kind}"] for kind in ("spans", "span_ends")
  )
  parts = np.split(spans, ends[:-1])
  for talk, expected in zip(recorded.config["talks"], parts, strict=True):
    if not expected.size:
      continue
    options = dict(tokenizer.named) | _options(talk)
    made = chat.render(tokenizer.chat_template, talk["messages"], **options)
    np.testing.assert_array_equal(np.ravel(made.spans), expected)


def test_texts_get_the_recorded_ids(published, recorded):
  name, tokenizer = published
  for text, kind in ((recorded.config["text"], "text"), ("", "empty")):
    ids = [*tokenizer.prompt(text), *tokenizer.after_ids]
    np.testing.assert_array_equal(ids, recorded.arrays[f"{name}_{kind}"])

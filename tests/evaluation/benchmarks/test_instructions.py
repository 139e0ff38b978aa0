"""Generated instructions: their answers, what is held out, their tokenizer."""

import json

import pytest

from dllm_jax.data import make_tokenizer
from dllm_jax.evaluation.benchmarks import instructions as lib
from dllm_jax.evaluation.benchmarks.instructions import Question


@pytest.mark.parametrize(
  "kind, answer",
  {
    "reverse": "cabdb",
    "double": "bbddbbaacc",
    "first": "b",
    "last": "c",
    "length": "5",
    "copy": "bdbac",
    "sort": "abbcd",
    "other": "no",
  }.items(),
)
def test_answers(kind, answer):
  assert Question(kind, "bdbac", kind).answer == answer


def test_held_out_words_are_never_taught():
  taught = lib.questions(lib.LATER, 3000, seed=0)
  asked = lib.questions(lib.LATER, 300, seed=0, held_out=True)
  assert len(set(taught)) == 3000 and len(set(asked)) == 300
  assert not {q.word for q in taught} & {q.word for q in asked}
  for kind in lib.LATER:
    assert sum(q.kind == kind for q in asked) == 100
  assert lib.questions(lib.LATER, 300, seed=0, held_out=True) == asked
  assert lib.questions(lib.LATER, 300, seed=1, held_out=True) != asked


def test_a_letter_is_a_token_and_a_role_is_one(tmp_path):
  tokenizer = make_tokenizer(lib.write_tokenizer(tmp_path), [])
  messages = Question("sort", "cab", "sort").messages
  ids = tokenizer.chat(messages[:1])
  said = tokenizer.decode(ids, special=True)
  assert said == "<|user|>sort cab<|end|><|assistant|>"
  assert len(ids) == len("sort cab") + 3
  assert tokenizer.decode(tokenizer.encode("abc 12")) == "abc 12"
  path = tmp_path / "asked.jsonl"
  lib.write([Question("sort", "cab", "sort")], path)
  assert json.loads(path.read_text()) == {"messages": messages}

"""Conversations in the forms in which they are published, counted exactly."""

import json
import warnings

import numpy as np
import pytest

from dllm_jax.data import Dataset, load, prepare
from dllm_jax.data.conversations import (
  forms,
  load_examples,
  load_preferences,
  messages,
)
from dllm_jax.objectives.texts import Fill
from tests.data import chats
from tests.data.chats import ASSISTANT, END, EOS, said, SYSTEM, TURN, USER


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return chats.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _examples(path, tokenizer, **fields):
  fields = {"held_out": 0.0, "length": 64} | fields
  return load_examples(Dataset(path=str(path), **fields), tokenizer).train


ASKED = [TURN, USER, 1, 2, END, TURN, ASSISTANT]
ANSWERED = [*ASKED, 3, 4, END]
_TALK = said("w1 w2", "w3 w4")
ONE = {
  "messages": {"messages": _TALK},
  "parts": {
    "messages": [
      _TALK[0],
      {
        "role": "assistant",
        "content": [{"type": "text", "text": "w3"}, {"text": " w4"}],
      },
    ]
  },
  "json": {"messages": json.dumps(_TALK)},
  "conversations": {
    "conversations": [
      {"from": "human", "value": "w1 w2"},
      {"from": "gpt", "value": "w3 w4"},
    ]
  },
  "prompt": {"prompt": "w1 w2", "completion": "w3 w4"},
  "prompt of messages": {"prompt": _TALK[:1], "completion": _TALK[1:]},
  "instruction": {"instruction": "w1", "input": "w2", "output": "w3 w4"},
  "no input": {"instruction": "w1 w2", "input": "", "output": "w3 w4"},
  "question": {"question": "w1 w2", "answer": "w3 w4", "id": 7},
}


@pytest.mark.parametrize("form", ONE)
def test_forms(form, tokenizer, tmp_path):
  path = chats.write(tmp_path / "a.jsonl", [ONE[form]] * 3)
  found = _examples(path, tokenizer)
  assert len(found) == 3
  for tokens, counts in found:
    assert tokens.tolist() == ANSWERED
    assert counts.tolist() == [False] * 7 + [True] * 3
    assert tokens.dtype == np.int32 and counts.dtype == bool
  assert found[0].given == 7


def test_what_stands_before(tokenizer, tmp_path):
  rows = [
    {"system": "w9", **ONE["instruction"], "history": [["w5", "w6"]]},
    {
      "prompt": said("w5", "w6", "w1 w2"),
      "completion": "w3 w4",
      "system": "w9",
    },
  ]
  before = [TURN, SYSTEM, 9, END, TURN, USER, 5, END, TURN, ASSISTANT, 6, END]
  for n, row in enumerate(rows):
    path = chats.write(tmp_path / f"{n}.jsonl", [row])
    ((tokens, counts),) = _examples(path, tokenizer)
    assert tokens.tolist() == before + ANSWERED
    assert counts.tolist() == [False] * (len(before) + 7) + [True] * 3


def test_all_answers_or_the_last(tokenizer, tmp_path):
  talk = said("w1", "w2", "w3", "w4 w5", "w6")
  path = chats.write(tmp_path / "a.jsonl", [{"messages": talk}])
  ((tokens, counts),) = _examples(path, tokenizer)
  assert tokens[counts].tolist() == [2, END, 4, 5, END]
  assert tokens[-1] == END  # Nobody answers what follows.
  ((tokens, counts),) = _examples(path, tokenizer, supervise="last")
  assert tokens[counts].tolist() == [4, 5, END]
  opened = said("w1", "w2", "w3", first="assistant")
  path = chats.write(tmp_path / "b.jsonl", [{"messages": opened}])
  ((tokens, counts),) = _examples(path, tokenizer)
  assert tokens[counts].tolist() == [3, END]


def _published(rows, folder, features=None):
  datasets = pytest.importorskip("datasets")
  made = datasets.Dataset.from_list(rows, features=features)
  datasets.disable_progress_bars()
  made.to_parquet(str(folder / "a.parquet"))
  made.save_to_disk(str(folder / "saved"))
  return [folder / "a.parquet", folder / "saved"]


def test_columns_as_datasets_writes_them(tokenizer, tmp_path):
  """Structs, JSON a message, JSON a content: all are the same conversations."""
  datasets = pytest.importorskip("datasets")
  if not hasattr(datasets, "Json"):
    pytest.skip("needs datasets 5")
  talk, parts = ONE["messages"]["messages"], ONE["parts"]["messages"]
  more = [talk[0], talk[1] | {"weight": 1}]
  message = {"role": datasets.Value("string"), "content": datasets.Json()}
  cases = {
    "structs": ([talk, talk], None),
    "messages": ([more, talk], datasets.List(datasets.Json())),
    "contents": ([parts, talk], datasets.List(message)),
  }
  for name, (talks, column) in cases.items():
    features = column and datasets.Features({"messages": column})
    folder = tmp_path / name
    folder.mkdir()
    rows = [{"messages": one} for one in talks]
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      for path in _published(rows, folder, features):
        found = _examples(path, tokenizer)
        assert [e.tokens.tolist() for e in found] == [ANSWERED] * 2, name


def test_null_fields_of_columns_are_not_there(tmp_path):
  pyarrow = pytest.importorskip("pyarrow")
  import pyarrow.parquet as parquet

  call = {"name": "f", "arguments": {"x": 1, "y": None}}
  talk = [
    {"role": "user", "content": "a", "tool_calls": None},
    {"role": "assistant", "content": "b", "tool_calls": [{"function": call}]},
  ]
  table = pyarrow.Table.from_pylist([{"messages": talk, "tools": None}])
  parquet.write_table(table, tmp_path / "a.parquet")
  form = forms.FORMS["messages"]
  (record,) = forms.source.records(str(tmp_path / "a.parquet"))
  found = form.read(record)
  assert found.messages[0] == {"role": "user", "content": "a"}
  (said_call,) = found.messages[1]["tool_calls"]
  assert said_call["function"]["arguments"] == {"x": 1}
  assert found.tools is None


def test_calls_and_roles_have_one_spelling():
  given = [
    {"from": "system", "value": "s"},
    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    {"from": "observation", "value": "2"},
    {"role": "assistant", "content": None, "tool_calls": [
      {"function": {"name": "g", "arguments": '{"y": null}'}}]},
  ]  # fmt: skip
  found = messages.normal(given)
  assert [m["role"] for m in found] == ["system", "assistant", "tool"] + [
    "assistant"
  ]
  calls = [m["tool_calls"][0]["function"] for m in (found[1], found[3])]
  assert calls[0] == {"name": "f", "arguments": {"x": 1}}
  assert calls[1] == {"name": "g", "arguments": {"y": None}}


PAIRS = {
  "texts": {"prompt": "w1 w2", "chosen": "w3 w4", "rejected": "w5"},
  "messages": {
    "prompt": _TALK[:1],
    "chosen": _TALK[1:],
    "rejected": said("w5", first="assistant"),
  },
  "whole": {"chosen": _TALK, "rejected": said("w1 w2", "w5")},
  "both": {
    "prompt": "w1 w2",
    "chosen": _TALK,
    "rejected": said("w1 w2", "w5"),
    "messages": _TALK,
  },
  "sharegpt": {
    "conversations": [{"from": "human", "value": "w1 w2"}],
    "chosen": {"from": "gpt", "value": "w3 w4"},
    "rejected": {"from": "gpt", "value": "w5"},
  },
  "spoken": {
    "chosen": "\n\nHuman: w1 w2\n\nAssistant: w3 w4",
    "rejected": "\n\nHuman: w1 w2\n\nAssistant: w5",
  },
}


@pytest.mark.parametrize("form", PAIRS)
def test_preferences(form, tokenizer, tmp_path):
  path = chats.write(tmp_path / "a.jsonl", [PAIRS[form]] * 2)
  dataset = Dataset(path=path, held_out=0.0, length=16)
  found = load_preferences(dataset, tokenizer)
  assert len(found.train) == 2 and not found.held_out
  chosen, rejected = found.train[0]
  assert chosen.tokens.tolist() == ANSWERED
  assert rejected.tokens.tolist() == [*ASKED, 5, END]
  assert chosen.given == rejected.given == 7
  # Evaluation reads the better answers.
  row = load(dataset, tokenizer=tokenizer).train[0]
  assert row.tokens[: len(ANSWERED)].tolist() == ANSWERED


def test_the_form_can_be_said(tokenizer, tmp_path):
  row = PAIRS["both"] | {"text": "w7 w8"}
  path = chats.write(tmp_path / "a.jsonl", [row])
  ((tokens, _),) = _examples(path, tokenizer, format="messages")
  assert tokens.tolist() == ANSWERED
  for fields in ({"format": "text"}, {"text_field": "prompt"}):
    dataset = Dataset(path=path, held_out=0.0, length=8, **fields)
    corpus = load(dataset, tokenizer=tokenizer)
    assert not corpus.reports
  with pytest.raises(ValueError, match="format is instruction.*no field"):
    load_examples(Dataset(path=path, format="instruction"), tokenizer)
  with pytest.raises(ValueError, match="data.format 'chat' is unknown; legal"):
    Dataset(path=path, format="chat")
  with pytest.raises(ValueError, match="not preferences"):
    load_preferences(Dataset(path=path, format="messages"), tokenizer)


BAD = [
  ({"messages": said("w1")}, "no message of the assistant's"),
  ({"messages": [{"role": "assistant", "content": "w1"}]}, "answers another"),
  ({"messages": [{"content": "w1"}]}, "message 1 must be an object with role"),
  ({"messages": [3]}, "message 1 must be an object"),
  ({"messages": 3}, "int is no list of messages"),
  ({"other": 3}, "there is no field 'messages'; fields: other"),
  (
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    "message 1 has a part of type 'image_url'; only texts",
  ),
  ({"messages": said("w1 <m>", "w2")}, "contains the mask token '<m>'"),
  ("hello", "an object with fields was expected, not 'hello'"),
  (
    {"messages": [said("w1")[0], {"role": "assistant", "content": None}]},
    r"a message needs a role and a content, not \['role'\]",
  ),
  (ONE["messages"] | {"tools": "w1"}, "tools must be a list, or its JSON"),
  (
    ONE["messages"] | {"chat_template_kwargs": "w1"},
    "chat_template_kwargs must be an object, or its JSON",
  ),
  (
    ONE["messages"] | {"chat_template_kwargs": {"messages": []}},
    "may not name 'messages'",
  ),
]


def test_odd_values_of_other_forms_are_told(tokenizer, tmp_path):
  turns = ONE["instruction"] | {"history": [["w1"]]}
  number = ONE["question"] | {"answer": 4}
  for row, message in (
    (turns, r"history must be pairs .* not \['w1'\]"),
    (number, "text was expected, not int: 4"),
  ):
    path = chats.write(tmp_path / "a.jsonl", [row])
    with pytest.raises(ValueError, match=f"row 1: {message}"):
      _examples(path, tokenizer)


def test_values_that_are_json_or_null_are_what_they_stand_for():
  row = ONE["messages"] | {"tools": "null", "chat_template_kwargs": '{"a": 1}'}
  read = forms.FORMS["messages"].read(row)
  assert (read.tools, read.variables) == (None, {"a": 1})


@pytest.mark.parametrize(("row", "message"), BAD)
def test_bad_rows(row, message, tokenizer, tmp_path):
  path = chats.write(tmp_path / "a.jsonl", [ONE["messages"], row])
  with pytest.raises(ValueError, match=message) as error:
    _examples(path, tokenizer)
  assert f"{path}: row 2: " in str(error.value)
  assert "\n" not in str(error.value)
  dataset = Dataset(path=path, held_out=0.0, length=16, skip_bad=True)
  corpus = load(dataset, tokenizer=tokenizer)
  assert len(corpus.train) == 1
  (report,) = corpus.reports
  assert f"1 bad, left out (the first: {path}: row 2: " in str(report)


def test_pairs_that_cannot_be(tokenizer, tmp_path):
  same = PAIRS["texts"] | {"rejected": "w3 w4"}
  alone = {"chosen": "w3", "rejected": "w4"}
  for row, message in ((same, "the same answer"), (alone, "without a prompt")):
    path = chats.write(tmp_path / "a.jsonl", [PAIRS["texts"], row])
    with pytest.raises(ValueError, match=f"row 2: .*{message}"):
      load_preferences(Dataset(path=path, length=16), tokenizer)
    dataset = Dataset(path=path, length=16, held_out=0.0, skip_bad=True)
    assert len(load_preferences(dataset, tokenizer).train) == 1


def test_templates_refuse_what_does_not_alternate(tmp_path):
  strict = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 =="
    " 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}"
  )
  tokenizer = chats.tokenizer(tmp_path / "t", strict + chats.TEMPLATE)
  twice = [said("w1")[0], *said("w1", "w2")]
  path = chats.write(
    tmp_path / "a.jsonl", [ONE["messages"], {"messages": twice}]
  )
  with pytest.raises(ValueError, match="row 2: .*Roles must alternate"):
    _examples(path, tokenizer)


def test_models_that_cannot_talk(tmp_path):
  path = chats.write(tmp_path / "a.jsonl", [ONE["messages"]])
  tokenizer = chats.tokenizer(tmp_path / "t", None)
  with pytest.raises(ValueError, match="--config.data.template=FILE"):
    _examples(path, tokenizer)
  for name in (None, "bpe:300"):
    with pytest.raises(ValueError, match="no tokenizer is learned"):
      load(Dataset(path=path, tokenizer=name))
  with pytest.raises(
    ValueError, match=r"need a tokenizer\.json .*bytes tokens"
  ):
    load(Dataset(path=path, tokenizer="byte"))
  # A template that is given ends what is sampled, too.
  file = tmp_path / "chat.jinja"
  file.write_text(chats.TEMPLATE)
  given = {"length": 16, "held_out": 0.0, "template": str(file)}
  made = load(Dataset(path=path, tokenizer=str(tmp_path / "t"), **given))
  assert made.tokenizer.chat_template == chats.TEMPLATE
  assert made.tokenizer.end_ids == (EOS, END)
  ((tokens, _),) = load_examples(Dataset(path=path, **given), tokenizer).train
  assert tokens.tolist() == ANSWERED
  with pytest.raises(FileNotFoundError, match="data.template"):
    load_examples(Dataset(path=path, template="nowhere"), tokenizer)
  for text, says in (
    (b"{% if %}", "no Jinja template"),
    (b"\xff", "no text in UTF-8"),
  ):
    file.write_bytes(text)
    with pytest.raises(ValueError, match=f"data.template '.*{says}"):
      load_examples(Dataset(path=path, **given), tokenizer)


def test_text_is_not_what_is_said(tokenizer, tmp_path):
  path = chats.write(tmp_path / "a.jsonl", [ONE["messages"]] * 50)
  with pytest.raises(ValueError, match="'messages' holds conversations"):
    load(Dataset(path=path, text_field="messages"), tokenizer=tokenizer)
  with pytest.raises(ValueError, match="dllm train reads them as they are"):
    prepare(path, "byte", str(tmp_path / "p"))
  # Text that was rendered before keeps its special tokens.
  text = "<t><user>w1 w2</t><t><assistant>w3 w4</t>"
  path = chats.write(tmp_path / "b.jsonl", [{"text": text}] * 50)
  corpus = load(
    Dataset(path=path, length=11, held_out=0.0), tokenizer=tokenizer
  )
  assert corpus.train[0].tokens.tolist() == [*ANSWERED, EOS]


def test_too_much_to_hold(tokenizer, tmp_path):
  path = chats.write(tmp_path / "a.jsonl", [ONE["messages"]])
  with pytest.raises(ValueError, match="held in memory .*in_memory_bytes"):
    _examples(path, tokenizer, in_memory_bytes=10)


def test_held_out_by_conversation(tokenizer, tmp_path):
  rows = [{"messages": said(f"w{i}", "w60")} for i in range(50)] * 2
  path = chats.write(tmp_path / "a.jsonl", rows)
  dataset = Dataset(path=path, held_out=0.2, length=16)
  found = load_examples(dataset, tokenizer)
  sides = [{e.tokens[2] for e in side} for side in found]
  assert len(found.train) + len(found.held_out) == 100
  assert 2 <= len(sides[1]) <= 20 and not sides[0] & sides[1]
  corpus = load(dataset, tokenizer=tokenizer, fill=Fill("counted"))
  # An answer of a word and its end: 2 tokens, 3 characters; 9 tokens fill.
  n = len(found.held_out)
  size = corpus.held_out_text
  assert (size.tokens, size.characters, size.bytes) == (2 * n, 3 * n, 3 * n)
  assert corpus.held_out_fill == 8 * n and corpus.text_share == 0.2
  other = chats.write(tmp_path / "b.jsonl", rows[:3])
  dataset = Dataset(path=path, held_out_path=other, length=16)
  found = load_examples(dataset, tokenizer)
  assert (len(found.train), len(found.held_out)) == (100, 3)
  with pytest.raises(ValueError, match="held_out 0.1 of so few"):
    load(Dataset(path=other, held_out=0.1, length=16), tokenizer=tokenizer)

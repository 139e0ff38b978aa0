"""Rows of conversations: what fills them, packing, order, and the originals'."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from dllm_jax.data import Dataset, held_out_batches, load, train_iterator
from dllm_jax.data.conversations import ConversationRows, Example, load_examples
from dllm_jax.data.conversations.rows import pack
from dllm_jax.data.huggingface import huggingface
from dllm_jax.objectives.bd3lm import BD3LM
from dllm_jax.objectives.texts import Fill
from tests import golden_cases
from tests.data import chats
from tests.data.chats import ASSISTANT, END, EOS, said, TURN, USER, words


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return chats.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _examples(*sizes):
  """Returns conversations of distinct tokens, whose last three count."""
  ends = np.cumsum(sizes)
  return [
    Example(np.arange(end - n, end, dtype=np.int32), np.arange(n) >= n - 3)
    for n, end in zip(sizes, ends, strict=True)
  ]


def _rows(examples, kind, multiple=0, packed=False, length=8, **fields):
  return ConversationRows(
    examples,
    length=length,
    packed=packed,
    fill=Fill(kind, multiple),
    fill_id=99,
    **fields,
  )


@pytest.mark.parametrize(
  ("kind", "multiple", "segments", "counts"),
  [
    ("counted", 0, "11111111", "00111111"),
    ("seen", 0, "11111111", "00111000"),
    ("none", 0, "11111000", "00111000"),
    ("counted", 3, "11111100", "00111100"),
    ("seen", 3, "11111100", "00111000"),
    ("none", 3, "11111000", "00111000"),
    ("counted", 4, "11111111", "00111111"),
  ],
)
def test_fill(kind, multiple, segments, counts):
  (row,) = _rows(_examples(5), kind, multiple)
  assert "".join(map(str, row.segments)) == segments
  assert "".join(map(str, row.mask.astype(int))) == counts
  filled = (row.segments > 0) & (np.arange(8) >= 5)
  assert row.tokens.tolist() == [0, 1, 2, 3, 4] + [99 * f for f in filled[5:]]
  (cut,) = _rows(_examples(5), kind, multiple, cut=[True])
  assert "".join(map(str, cut.mask.astype(int))) == "00111000"
  assert (cut.tokens == row.tokens).all()


def test_packed_to_whole_blocks():
  (row,) = _rows(_examples(5, 3), "counted", 4, packed=True, length=12)
  assert row.tokens.tolist() == [0, 1, 2, 3, 4, 99, 99, 99, 5, 6, 7, 99]
  assert row.segments.tolist() == [1] * 8 + [2] * 4
  assert row.mask.tolist() == [False] * 2 + [True] * 10
  (row,) = _rows(_examples(5, 3), "none", 4, packed=True, length=12)
  assert row.segments.tolist() == [1] * 5 + [0] * 3 + [2] * 3 + [0]
  (row,) = _rows(_examples(5, 3), "counted", 0, packed=True, length=12)
  assert row.segments.tolist() == [1] * 5 + [2] * 3 + [0] * 4


def test_a_token_is_needed_to_fill():
  fields = {"length": 8, "fill_id": None, "fill": Fill("counted")}
  ConversationRows(_examples(5), packed=True, **fields)
  with pytest.raises(ValueError, match=r"no end of text.*objective\.fill=none"):
    ConversationRows(_examples(5), packed=False, **fields)


@pytest.mark.parametrize("multiple", [0, 4])
def test_every_token_is_in_one_row_and_alone(multiple):
  rng = np.random.default_rng(0)
  sizes = rng.geometric(1 / 17, 500).clip(4, 64)
  examples = _examples(*sizes)
  rows = _rows(examples, "none", multiple, packed=True, length=64)
  found = []
  for row in rows:
    for segment in range(1, row.segments.max() + 1):
      (at,) = np.nonzero(row.segments == segment)
      assert (np.diff(at) == 1).all()
      assert at[0] % (multiple or 1) == 0
      found.append((row.tokens[at].tolist(), row.mask[at].tolist()))
    assert not row.mask[row.segments == 0].any()
  want = [(t.tolist(), c.tolist()) for t, c in examples]
  assert sorted(found) == sorted(want)
  whole = -(-sizes // (multiple or 1)) * (multiple or 1)
  assert len(rows) <= 1.03 * whole.sum() / 64 + 1  # Nearly nothing is wasted.


def test_packing_is_best_fit_in_order():
  assert pack([3, 5, 5, 3, 8, 2], 8) == [[0, 2], [1, 3], [4], [5]]
  assert pack([], 8) == []


def _corpus(tmp_path, tokenizer, **fields):
  rng = np.random.default_rng(1)
  rows = [
    {"messages": said(words(rng.integers(0, 61, n)), words([n % 61, i % 61]))}
    for i, n in enumerate(rng.integers(1, 20, 60))
  ]
  path = chats.write(tmp_path / "a.jsonl", rows)
  dataset = Dataset(path=path, length=32, **fields)
  return load(dataset, tokenizer=tokenizer, fill=Fill("counted", 4))


def test_batches_go_on_exactly(tokenizer, tmp_path):
  corpus = _corpus(tmp_path, tokenizer, packing="packed")
  again = _corpus(tmp_path, tokenizer, packing="packed")
  assert corpus.texts_apart
  make = lambda corpus: train_iterator(corpus, batch_size=4, seed=3)
  first, second = make(corpus), make(again)
  batches = [next(first) for _ in range(12)]  # More than an epoch.
  assert len(corpus.train) < 44
  for batch in batches[:5]:
    np.testing.assert_array_equal(next(second).tokens, batch.tokens)
    assert batch.texts_apart
  resumed = make(again)
  resumed.set_state(json.loads(json.dumps(second.get_state())))
  for batch in batches[5:]:
    found = next(resumed)
    for name in ("tokens", "loss_mask", "segment_ids", "positions"):
      np.testing.assert_array_equal(getattr(found, name), getattr(batch, name))
  for iterator in (first, second, resumed):
    iterator.close()


def test_held_out_rows_count_answers(tokenizer, tmp_path):
  corpus = _corpus(tmp_path, tokenizer, held_out=0.3)
  assert not corpus.texts_apart
  batches = list(held_out_batches(corpus, batch_size=4))
  counted = sum(int(batch.loss_mask.sum()) for batch in batches)
  assert counted == corpus.held_out_text.tokens + corpus.held_out_fill
  assert corpus.held_out_text.tokens == 3 * len(corpus.held_out)
  assert len(corpus.prompts) == 3
  ids, room = corpus.prompts[0]
  assert list(ids[-2:]) == [TURN, ASSISTANT] and 0 < room <= 32 - len(ids)


def test_a_part_of_a_mixture(tokenizer, tmp_path):
  talk = [{"messages": said(f"w{i}", "w60")} for i in range(20)]
  texts = [{"text": f"w{i} w59"} for i in range(20)]
  a = chats.write(tmp_path / "a.jsonl", talk)
  b = chats.write(tmp_path / "b.jsonl", texts)
  dataset = Dataset(
    mixture=((a, 0.5), (b, 0.5)), length=16, packing="packed", held_out=0.3
  )
  corpus = load(dataset, tokenizer=tokenizer, fill=Fill("counted", 4))
  assert corpus.texts_apart and len(corpus.reports) == 1
  iterator = train_iterator(corpus, batch_size=4, seed=0)
  rows = [row for _ in range(4) for row in next(iterator).tokens]
  iterator.close()
  kinds = [(60 in row, 59 in row) for row in rows]
  assert set(kinds) == {(True, False), (False, True)}  # Never both in a row.
  assert 7 <= kinds.count((True, False)) <= 9


def test_what_is_said(tokenizer, tmp_path, monkeypatch):
  talk = [{"messages": said("w1", "w2")}] * 9 + [
    {"messages": said("w1", "w2 " * 30)}
  ]
  path = chats.write(tmp_path / "a.jsonl", talk)
  dataset = Dataset(path=path, length=16, held_out=0.0)
  (report,) = load(dataset, tokenizer=tokenizer, fill=Fill("counted")).reports
  monkeypatch.delenv("FORCE_COLOR", raising=False)
  line, row = str(report).split("\n")
  assert line == (
    f"{path}: 10 rows of messages (messages), 9 to train on in 9 rows of "
    "tokens, 0 held out, 1 too long, left out"
  )
  assert row == "<t> <user> w1 </t> <t> <assistant>>>w2 </t> <eos> x 8<<"
  monkeypatch.setenv("FORCE_COLOR", "1")
  assert "<assistant>\x1b[32mw2 </t>" in str(report)
  monkeypatch.setenv("NO_COLOR", "1")
  assert "\x1b" not in str(report)


ANSWER = [20, 21, 22]


@pytest.mark.parametrize(
  ("too_long", "tokens", "counted"),
  [
    ("left", [END, TURN, ASSISTANT, 20, 21, 22, END], [20, 21, 22, END]),
    ("cut", [TURN, USER, 1, END, TURN, ASSISTANT, 20], [20]),
  ],
)
def test_too_long(too_long, tokens, counted, tokenizer, tmp_path):
  talk = said("w1", words(ANSWER))
  path = chats.write(tmp_path / "a.jsonl", [{"messages": talk}] * 2)
  fields = {"path": path, "length": 7, "held_out": 0.0}
  dataset = Dataset(too_long=too_long, **fields)
  found = load_examples(dataset, tokenizer).train
  assert found[0].tokens.tolist() == tokens
  assert found[0].tokens[found[0].counts].tolist() == counted
  (report,) = load(dataset, tokenizer=tokenizer).reports
  assert "2 too long, shortened" in str(report)
  with pytest.raises(ValueError, match="none is left .*2 longer than"):
    load_examples(Dataset(**fields), tokenizer)
  talk = said(words([1] * 9), words([20] * 9))
  path = chats.write(tmp_path / "b.jsonl", [{"messages": talk}])
  with pytest.raises(ValueError, match="row 1: the answer leaves no room"):
    load_examples(
      Dataset(path=path, length=7, held_out=0.0, too_long=too_long), tokenizer
    )


def test_block_objectives_fill_whole_blocks():
  fields = {"fill": "counted", "fill_to": 0, "block_size": 4}
  assert BD3LM.filling(fields) == Fill("counted", 4)


# ------------------------------------------------------------------ originals


@pytest.fixture(scope="module")
def sft():
  return golden_cases.load("sft")


def _names(arrays):
  """Returns the special tokens of recorded conversations, by their ids.

  A turn is who speaks between two tokens, the content, and a token at its end.
  """
  ids, given = arrays["dllm_map_input_ids"][0], arrays["dllm_map_prompt_len"][0]
  begin, user, head = ids[:3].tolist()
  assistant = int(ids[given - 2])
  end = int(ids[arrays["dllm_map_lengths"][0] - 1])
  return {
    begin: "<t>",
    user: "<user>",
    assistant: "<assistant>",
    head: "<h>",
    end: "</t>",
  }


def _talk(ids, names):
  """Returns the messages that recorded ids are a rendering of."""
  turns, ids = [], [names.get(i, f"w{i}") for i in ids.tolist()]
  while ids:
    end = ids.index("</t>")
    content = " ".join(ids[3:end])
    turns.append({"role": ids[1].strip("<>"), "content": content})
    ids = ids[end + 1 :]
  return turns


@pytest.fixture(scope="module")
def recorded(sft, tmp_path_factory):
  """Returns recorded conversations as a file, and the tokenizer they are for."""
  folder = tmp_path_factory.mktemp("sft")
  a, names = sft.arrays, _names(sft.arrays)
  talks = [
    {"messages": _talk(ids[:n], names)}
    for ids, n in zip(
      a["dllm_map_input_ids"], a["dllm_map_lengths"], strict=True
    )
  ]
  eos, mask = sft.config["eos_token_id"], sft.config["mask_token_id"]
  names |= {eos: "<eos>", mask: "<m>"}
  size = sft.config["hf_config"]["vocab_size"]
  vocabulary = {names.get(i, f"w{i}"): i for i in range(size)}
  made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  made.add_special_tokens([*names.values()])
  made.save(str(folder / "tokenizer.json"))
  template = chats.TEMPLATE.replace("}}>{{", "}}><h>{{").replace(
    "<t><assistant>", "<t><assistant><h>"
  )
  config = {
    "eos_token": "<eos>",
    "mask_token": "<m>",
    "chat_template": template,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return chats.write(folder / "a.jsonl", talks), huggingface(str(folder))


def test_dllm_maps_conversations_so(sft, recorded):
  a, (path, tokenizer) = sft.arrays, recorded
  dataset = Dataset(path=path, length=64, held_out=0.0, supervise="last")
  found = load_examples(dataset, tokenizer).train
  assert [len(e.tokens) for e in found] == a["dllm_map_lengths"].tolist()
  assert [e.given for e in found] == a["dllm_map_prompt_len"].tolist()
  for example, ids, labels in zip(
    found, a["dllm_map_input_ids"], a["dllm_map_labels"], strict=True
  ):
    n = len(example.tokens)
    np.testing.assert_array_equal(example.tokens, ids[:n])
    np.testing.assert_array_equal(example.counts, labels[:n] != -100)


def test_dllm_cuts_and_fills_so(sft, recorded):
  a, (path, tokenizer) = sft.arrays, recorded
  length = sft.config["dllm_max_length"]
  fields = {"length": length, "held_out": 0.0, "supervise": "last"}
  dataset = Dataset(path=path, too_long="cut", skip_bad=True, **fields)
  corpus = load(dataset, tokenizer=tokenizer, fill=Fill("counted"))
  # Deviates: a row of which no answer is left is left out, not kept at no loss.
  rows = a["dllm_right_rows"]
  kept = (a["dllm_labels"] != -100).any(axis=1)
  assert len(corpus.train) == kept.sum()
  for row, ids, labels in zip(
    corpus.train, a["dllm_input_ids"][kept], a["dllm_labels"][kept], strict=True
  ):
    np.testing.assert_array_equal(row.tokens, ids)
    np.testing.assert_array_equal(row.mask, labels != -100)
  assert corpus.reports[0].count.bad == len(a["dllm_map_lengths"]) - kept.sum()
  assert len(rows) == len(kept)
  found = load_examples(Dataset(path=path, **fields), tokenizer).train
  lengths = [len(e.tokens) for e in found]
  assert lengths == a["dllm_filter_lengths"].tolist()


def test_d1_fills_so(sft):
  """From d1's own tokens: its text ends with a header, which ours leaves out."""
  a, length = sft.arrays, sft.config["d1_prep_max_length"]
  pairs = [
    (a[f"d1_prep_full_ids_{i}"], a[f"d1_prep_prompt_ids_{i}"])
    for i in range(len(a["d1_prep_input_ids"]))
  ]
  examples = [
    Example(full[:length], np.arange(min(len(full), length)) >= len(prompt))
    for full, prompt in pairs
  ]
  rows = ConversationRows(
    examples,
    length=length,
    packed=False,
    fill=Fill("counted"),
    fill_id=sft.config["eos_token_id"],
  )
  for row, ids, given in zip(
    rows, a["d1_prep_input_ids"], a["d1_prep_prompt_lengths"], strict=True
  ):
    np.testing.assert_array_equal(row.tokens, ids)
    np.testing.assert_array_equal(row.mask, np.arange(length) >= given)


def test_eos_is_what_fills(tokenizer, tmp_path):
  path = chats.write(tmp_path / "a.jsonl", [{"messages": said("w1", "w2")}])
  dataset = Dataset(path=path, length=10, held_out=0.0)
  corpus = load(dataset, tokenizer=tokenizer, fill=Fill("seen"))
  assert corpus.train[0].tokens[-2:].tolist() == [EOS, EOS]

"""What stands around answers: divisions, beginnings, stops, wishes."""

import types

import pytest

from dllm_jax.data.huggingface import huggingface
from dllm_jax.evaluation.likelihood import contexts
from tests.data.test_chat import folder as tokenizer_folder


def test_beginnings_ends_and_what_fits(monkeypatch):
  tokenizer = types.SimpleNamespace(bos_id=7, eos_id=8, end_ids=(8,))
  assert contexts.special(tokenizer, "begin", True) == [7]
  assert contexts.special(tokenizer, "end", True) == [8]
  assert contexts.special(tokenizer, "end", False) == []
  assert contexts.begun([7], [1, 2]) == contexts.begun([7], [7, 1, 2])
  assert contexts.begun([], [1]) == [1] and contexts.begun([7], []) == [7]
  assert contexts.fitting([7], [1, 2, 3], 4) == [7, 1, 2, 3]
  monkeypatch.setattr(contexts, "_said", set())
  with pytest.warns(UserWarning, match="cut from the left"):
    assert contexts.fitting([7], [1, 2, 3], 2) == [7, 3]
  # A beginning that stood there already is kept, too.
  assert contexts.fitting([7], [7, 1, 2, 3], 2) == [7, 3]
  assert contexts.fitting([7], [1, 2, 3], 0) == []
  assert contexts.cut("one\n\ntwo", ["\n\n", "w"]) == "one"


# EleutherAI/lm-evaluation-harness 0.4.13, `_encode_pair`: what is left of the
# whole, which is nothing, or not the answer, where one token spans both.
@pytest.mark.parametrize(
  ("pair", "expected"),
  [
    (("Ans", "wer"), (["Ans"], ["wer"])),
    (("Ans", "w"), (["Ans"], ["w"])),
    (("An", "swer"), (["An"], ["s", "wer"])),
    (("An", "sw"), (["An"], ["s", "w"])),
    (("A", "nswer"), (["A"], ["n", "s", "wer"])),
    (("", "wer"), ([], ["wer"])),
    (("Ans ", "we"), (["Ans"], [" ", "we"])),
    (("Ans", ""), (["Ans"], [])),
  ],
  ids=str,
)
def test_an_answer_that_shares_a_token_is_encoded_by_itself(
  pair, expected, spanning
):
  tokenizer = huggingface(str(spanning))
  name = tokenizer._tokenizer.id_to_token
  found = contexts.divided(tokenizer.encode, *pair)
  assert tuple([name(i) for i in part] for part in found) == expected


# LLaDA's eval_llada.py cuts the text in which special tokens are written out,
# lm-evaluation-harness 0.4.13's own class then that in which they are not.
@pytest.mark.parametrize(
  ("until", "expected"),
  [
    ([], "a b b a"),
    ([""], "a b b a"),
    (["<|end|>"], "a b"),
    (["<|user|>", "<|nothing|>"], "a b b"),
    (["b"], "a"),
    (["<|end|> b", "<|user|>"], "a b"),
    (["|>"], "a b <|end"),
    (["b b"], "a"),
  ],
  ids=str,
)
def test_stops_may_be_special_tokens(tmp_path, until, expected):
  decode = huggingface(tokenizer_folder(tmp_path)).decode
  ids = [0, 1, 6, 1, 4, 0]  # a b <|end|> b <|user|> a
  assert contexts.stopped(ids, until, decode).rstrip() == expected


def test_answers_end_where_they_end(tmp_path):
  decode = huggingface(tokenizer_folder(tmp_path)).decode
  ids = [0, 1, 6, 1, 4, 0]
  stopped = lambda *until: contexts.stopped(ids, until, decode, ends=(6, 4))
  assert stopped() == stopped("<|user|>") == "a b"
  # A stop may hold the end, which itself is never part of an answer.
  assert stopped("b <|end|>").rstrip() == "a"
  assert contexts.stopped([6, 0], [], decode, ends=(6,)) == ""
  behind = lambda mark, ends=(): contexts.behind(ids, mark, decode, ends=ends)
  assert behind("<|end|>") == behind(6) == [1, 4, 0]
  assert behind("<|nothing|>") == behind(3) == ids
  assert behind("<|user|>", (6,)) == behind(4, (6,)) == [0, 1, 6]


def test_a_stop_inside_a_character():
  # Bytes as tokens, two of them one character.
  decode = lambda ids, special=False: bytes(ids).decode(errors="replace")
  ids = list("né\nx".encode())
  assert contexts.stopped(ids, ["\n"], decode) == "né"
  assert contexts.stopped(ids, ["é"], decode) == "n"


def wishes(fixed=False, **kwargs):
  return contexts.wishes(kwargs, tokens=9, fixed=fixed)


# `normalize_gen_kwargs` and the task files of lm-evaluation-harness 0.4.13.
@pytest.mark.parametrize(
  ("kwargs", "expected"),
  [
    ({}, ([], 9, {})),
    ({"until": None, "max_gen_toks": None}, ([], 9, {})),
    ({"until": "x"}, (["x"], 9, {})),
    ({"max_gen_toks": "5", "max_new_tokens": 6}, ([], 5, {})),
    ({"max_completion_tokens": 6}, ([], 6, {})),
    ({"num_beams": 1, "do_sample": False}, ([], 9, {"temperature": 0.0})),
    ({"temperature": "0"}, ([], 9, {"temperature": 0.0})),
    ({"do_sample": True}, ([], 9, {})),
    (
      {"do_sample": True, "temperature": 1, "top_k": 5.0},
      ([], 9, {"temperature": 1.0, "top_k": 5}),
    ),
    ({"do_sample": False, "top_p": 0.5}, ([], 9, {"temperature": 0.0})),
  ],
  ids=str,
)
def test_wishes_of_tasks(kwargs, expected):
  assert wishes(**kwargs) == expected


def test_fixed_protocols_heed_stops_and_greed():
  assert wishes(True, max_gen_toks=5, temperature=0.7) == ([], 9, {})
  greedy = ["x"], 9, {"temperature": 0.0}
  assert wishes(True, until="x", do_sample=False, temperature=0.7) == greedy
  for kwargs, said in (
    ({"num_beams": 4}, "cannot be asked for num_beams"),
    ({"max_gen_toks": 0}, "must be at least 1, not 0"),
    ({"until": 5}, "a text or a list of texts, not 5"),
    ({"until": ["x", None]}, "a text or a list of texts"),
  ):
    with pytest.raises(ValueError, match=said):
      wishes(**kwargs)

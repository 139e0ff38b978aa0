"""Facts: what is taught and what is asked; reading files; marking answers."""

import json

import pytest

from dllm_jax.evaluation.benchmarks import facts as facts_lib
from dllm_jax.evaluation.benchmarks import recall
from dllm_jax.evaluation.benchmarks.facts import Question


def test_made_facts_are_told_in_one_direction():
  facts = facts_lib.synthetic(facts=3, taught=4, seed=1)
  assert facts == facts_lib.synthetic(facts=3, taught=4, seed=1)
  assert len(facts.statements) == 3 * 4 + 3 * 4 + 3 * 8
  people = {(q.group, q.fact) for q in facts.questions}
  assert len(people) == 9
  for question in facts.questions:
    whole = question.before + question.answer + question.after
    assert whole not in facts.statements  # another wording
  for group, name_first in (("name_first", True), ("description_first", False)):
    for person in [fact for g, fact in people if g == group]:
      told = [s for s in facts.statements if person in s]
      assert len(told) == 4
      assert {s.index(person) < s.index(" the ") for s in told} == {name_first}


def test_every_question_has_its_answer_told():
  facts = facts_lib.synthetic(facts=2)
  for question in facts.questions:
    assert any(
      question.answer in s and question.fact in s for s in facts.statements
    )


def test_files_in_the_form_of_the_reversal_curse(tmp_path):
  def write(name, rows):
    lines = [json.dumps({"prompt": p, "completion": c}) for p, c in rows]
    (tmp_path / name).write_text("\n".join(lines) + "\n")

  write("p2d_prompts_train.jsonl", [("Ann Lee, known as", " the baker.")])
  write("p2d_prompts_test.jsonl", [("Once, Ann Lee was", " the baker.")])
  write("p2d_reverse_prompts_test.jsonl", [("The baker is", " Ann Lee")])
  facts = facts_lib.read(tmp_path)
  assert facts.statements == ("Ann Lee, known as the baker.",)
  asked = {(q.form, q.direction): q for q in facts.questions}
  assert len(asked) == 4
  infill = asked["infill", "reverse"]
  assert (infill.before, infill.answer) == ("Once,", " Ann Lee")
  assert infill.after == " was the baker."
  assert asked["prompt", "reverse"].before == "The baker is"
  # In another wording the fact has another answer, and is the same fact.
  test = "p2d_prompts_test.jsonl"
  write(test, [("Once, Ann Lee was", " the baker."), ("Ann Lee", " bakes.")])
  assert {q.fact for q in facts_lib.read(tmp_path).questions} == {"Ann Lee"}
  # Descriptions come first, and end with a period only where they end a text.
  write("d2p_prompts_train.jsonl", [("Known as the cook,", " Bo Ray")])
  write("d2p_prompts_test.jsonl", [("Once the cook,", " Bo Ray")])
  write("d2p_reverse_prompts_test.jsonl", [("Bo Ray was", " the cook.")])
  (infill,) = (
    q
    for q in facts_lib.read(tmp_path).questions
    if (q.group, q.form, q.direction) == ("d2p", "infill", "reverse")
  )
  assert (infill.before, infill.answer) == ("Once", " the cook")
  assert infill.after == ", Bo Ray"
  (tmp_path / "p2d_prompts_test.jsonl").write_text('{"prompt": "x"}\n')
  with pytest.raises(ValueError, match=r"p2d_prompts_test\.jsonl:1"):
    facts_lib.read(tmp_path)


def test_couplets(tmp_path):
  tsv = tmp_path / "a.tsv"
  tsv.write_text("一二三\t四五六\n七八九\t十百千\n")
  facts = facts_lib.read(tsv, limit=1)
  assert facts.statements == ("一二三,四五六",)
  reverse = [q for q in facts.questions if q.direction == "reverse"]
  assert {q.answer for q in reverse} == {"一二三"}
  file = tmp_path / "a.json"
  file.write_text(json.dumps([{"first": "ab", "second": "cd"}]))
  assert facts_lib.read(file).statements == ("ab,cd",)
  tsv.write_text("一二三\t四五六\n七八九\n")
  with pytest.raises(ValueError, match=r"a\.tsv:2"):
    facts_lib.read(tsv)
  file.write_text("[{]")
  with pytest.raises(ValueError, match=r"a\.json:1"):
    facts_lib.read(file)
  with pytest.raises(FileNotFoundError, match="synthetic"):
    facts_lib.read(tmp_path / "nothing")


def test_words_give_texts_back(tmp_path):
  facts = facts_lib.synthetic(facts=2)
  path = tmp_path / "tokenizer.json"
  path.write_text(recall.words(facts))
  words = recall.tokenizer(str(path))
  length = recall.row_length(facts, words)
  text = recall.training_text(facts, words, length)
  ids = words.encode(text)
  assert len(ids) == length * len(facts.statements)
  assert words.decode(ids) == text
  for row, statement in zip(
    ids.reshape(-1, length), facts.statements, strict=True
  ):
    assert words.decode(row).rstrip("\n") == statement
  for q in facts.questions:  # an answer is the same tokens wherever it stands
    whole = words.encode(q.before + q.answer + q.after).tolist()
    parts = [words.encode(x).tolist() for x in (q.before, q.answer, q.after)]
    assert whole == sum(parts, [])


def test_only_the_exact_answer_counts(tmp_path):
  facts = facts_lib.synthetic(facts=2)
  path = tmp_path / "tokenizer.json"
  path.write_text(recall.words(facts))
  words = recall.tokenizer(str(path))
  length = recall.row_length(facts, words)
  whole = {}

  def told(templates):
    for row, q in zip(templates, facts.questions, strict=True):
      known = [i for i in row if i is not None]
      answer = words.encode(q.answer).tolist()
      assert row.count(None) >= len(answer)
      at = row.index(None)
      full = row[:at] + answer + row[at + len(answer) :]
      whole[len(whole)] = [0 if i is None else i for i in full]
      assert len(known) + row.count(None) == length
    return list(whole.values())

  right = recall.ask(facts.questions, told, words, length=length)
  assert all(right)

  def mistaken(templates):
    return [[0 if i is None else i for i in row] for row in templates]

  assert not any(recall.ask(facts.questions, mistaken, words, length=length))


def test_errors_are_over_facts():
  def question(fact):
    return Question(
      fact=fact,
      group="g",
      direction="forward",
      form="prompt",
      before="",
      answer="",
    )

  asked = [question(f) for f in "aabbccdd"]
  right = [True] * 4 + [False] * 4
  (cell,) = recall.cells(asked, right)
  assert cell["accuracy"] == 0.5 and cell["facts"] == 4
  assert cell["standard_error"] == pytest.approx((1 / 3) ** 0.5 / 2)
  low, high = recall.wilson(0.0, 32)
  assert low == 0.0 and high == pytest.approx(0.1072, abs=1e-3)
  assert recall.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
  assert recall.standard_error([1.0]) is None

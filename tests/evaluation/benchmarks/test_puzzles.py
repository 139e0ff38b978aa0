"""Puzzles and exams: generators, verifiers, files, marks."""

import json

import pytest

from dllm_jax.evaluation.benchmarks import math_and_code, puzzles
from dllm_jax.evaluation.benchmarks.sandbox import Limits

GRID = "1234341221434321"


@pytest.mark.parametrize("kind", puzzles.KINDS)
def test_made_puzzles_have_their_answers(kind):
  made = puzzles.generate(kind, 8, seed=1)
  assert len({p.question for p in made}) == 8
  assert all(p.answer and p.check(p.answer) for p in made)
  assert made == puzzles.generate(kind, 8, seed=1)
  assert made != puzzles.generate(kind, 8, seed=2)


@pytest.mark.parametrize("kind", ["sudoku4", "sudoku9"])
def test_a_made_grid_has_one_solution(kind):
  for puzzle in puzzles.generate(kind, 3):
    assert puzzles.solutions(puzzle.given, limit=2) == [puzzle.answer]
    assert "0" in puzzle.given


def test_sudoku_is_checked_by_rules():
  puzzle = puzzles.Sudoku(given="1230341221434321")
  assert puzzle.check(GRID) and puzzles.solved(puzzle, GRID + ";;;")
  assert not puzzle.check(GRID[:-1]) and not puzzle.check(GRID + "1")
  assert not puzzle.check("1234" * 4)  # columns
  assert not puzzle.check("1234234134124123")  # boxes
  assert not puzzle.check("2134431212433421")  # rules, but not what was given
  assert puzzle.template() == "123?341221434321"


def test_countdown_is_checked_by_rules():
  puzzle = puzzles.Countdown(numbers=(15, 44, 79), target=50)
  assert puzzle.check("44-15=29,79-29=50")
  assert puzzle.check("79-44=35,35+15=50")  # another way
  for wrong in (
    "79-29=50",  # a number that is not there
    "44-15=29",  # numbers left
    "44-15=28,79-29=50",  # arithmetic
    "44-15=29,44-29=15,79-29=50",  # a number twice
    "",
    "15/44=0,79-29=50",  # not a whole number
  ):
    assert not puzzle.check(wrong)


def test_files_of_puzzles(tmp_path):
  csv = tmp_path / "a.csv"
  csv.write_text(f"Puzzle,Solution\n{'0' + GRID[1:]},{GRID}\n")
  assert puzzles.read(csv)[0].answer == GRID
  lines = [
    {"input": "0234\n3412\n2143\n4321", "output": "1234\n3412\n2143\n4321"},
    {"input": "15,44,79,50", "output": "44-15=29,79-29=50"},
    {"input": "30,100,93", "output": "23"},
  ]
  jsonl = tmp_path / "a.jsonl"
  jsonl.write_text("".join(json.dumps(row) + "\n" for row in lines))
  grid, steps, target = puzzles.read(jsonl)
  assert grid.given == "0" + GRID[1:]
  assert (steps.numbers, steps.target) == ((15, 44, 79), 50)
  assert (target.numbers, target.target) == ((30, 100, 93), 23)


@pytest.mark.parametrize(
  "line",
  [
    "no json",
    '{"input": 1}',
    '{"input": "123", "output": ""}',
    '{"input": "0234341221434321", "output": "2234341221434321"}',
    '{"input": "1,2,x", "output": "1"}',
    '{"input": "1,2,3", "output": "1+2=4"}',
  ],
)
def test_a_bad_line_is_named(tmp_path, line):
  path = tmp_path / "a.jsonl"
  path.write_text('{"input": "1,2,3", "output": "1+2=3"}\n' + line + "\n")
  with pytest.raises(ValueError, match=r"a\.jsonl:2"):
    puzzles.read(path)


def test_numbers_are_extracted_as_published():
  text = "He has 3 left.\n#### 1,234.\nQuestion: 5 + 6 = 11 #### 12"
  assert math_and_code.strict_number(text) == "1234"
  assert math_and_code.last_number("so $1,050.00 or 7 dollars.") == "7"
  assert math_and_code.last_number("it costs $1,050.") == "1050"
  assert (
    math_and_code.strict_number("nothing")
    is math_and_code.last_number("none")
    is None
  )
  problem = math_and_code.GSM8K(name="1", prompt="", answer="1234")
  assert problem.marked(text).right
  assert problem.marked("the answer is 1234").reason == "no number"
  assert problem.marked("#### 12").reason == "another number"


def test_gsm8k_file(tmp_path):
  path = tmp_path / "a.jsonl"
  rows = [{"question": "1+1?", "answer": "Two.\n#### 2"}] * 3
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  found = math_and_code.gsm8k(path, examples=path, shots=2)
  assert found[0].answer == "2" and found[0].prompt.count("#### 2") == 2
  assert found[0].prompt.endswith("Question: 1+1?\nAnswer:")
  path.write_text('{"question": "1+1?", "answer": "2"}\n')
  with pytest.raises(ValueError, match=r"a\.jsonl:1"):
    math_and_code.gsm8k(path)
  path.write_text('{"question": "1+1?"}\n')
  with pytest.raises(ValueError, match=r"a\.jsonl:1"):
    math_and_code.gsm8k(path)


def test_code_is_marked_by_its_tests(tmp_path):
  human = tmp_path / "human.jsonl"
  human.write_text(
    json.dumps({
      "task_id": "T/0",
      "prompt": "def add(a, b):\n",
      "entry_point": "add",
      "test": "def check(f):\n  assert f(1, 2) == 3",
    })
  )
  (problem,) = math_and_code.humaneval(human)
  limits = Limits(seconds=20.0)
  assert problem.marked("  return a + b\nprint(1/0)", limits).right  # is cut
  assert not problem.marked("  return a - b", limits).right
  mbpp = tmp_path / "mbpp.jsonl"
  row = {
    "text": "Add.",
    "code": "def add(a, b): return a + b",
    "test_list": ["assert add(1, 2) == 3", "assert add(n, 2) == 9"],
    "test_setup_code": "n = add(3, 4)",
  }
  rows = [{"task_id": i} | row for i in (2, 3, 4, 11)]
  mbpp.write_text("".join(json.dumps(r) + "\n" for r in rows))
  (problem,) = math_and_code.mbpp(mbpp)
  assert problem.prompt.count("[DONE]") == 3
  assert problem.marked(row["code"] + "\n[DONE] junk", limits).right
  assert not problem.marked("import sys; sys.exit(0)", limits).right

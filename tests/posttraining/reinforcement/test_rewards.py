"""What answers earn, by name, and what becomes of functions that fail."""

import math

import pytest

from dllm_jax.posttraining.reinforcement.rewards import parse, registry
from dllm_jax.posttraining.reinforcement.rewards.pool import Asked, Rewards

COUNTDOWN = {"numbers": [3, 5, 2], "target": 16}
GRID = {"given": "0030000040000324", "answer": "2431314242131324"}


@pytest.mark.parametrize(
  ("reward", "completion", "row", "earned"),
  [
    ("number", "so it is 1,024.", {"answer": "#### 1024"}, 1.0),
    ("number", "1024 or 7", {"answer": "1024"}, 0.0),
    ("number", "none", {"answer": "1024"}, 0.0),
    ("countdown", "3+5=8,8*2=16;;", COUNTDOWN, 1.0),
    ("countdown", "3+5=8,8*2=15;", COUNTDOWN, 0.0),
    ("countdown_steps", "3+5=8,8*2=16;", COUNTDOWN, 1.0),
    ("countdown_steps", "3+5=8,8*3=24;", COUNTDOWN, 0.25),
    ("countdown_steps", "3+5=9,9*2=18", COUNTDOWN, 0.0),
    # Many right steps earn no more than half.
    ("countdown_steps", "3+5=8,8+2=10,10", COUNTDOWN, 0.5),
    ("sudoku", GRID["answer"], GRID, 1.0),
    ("sudoku", "1" * 16, GRID, 0.0),
    ("sudoku_cells", GRID["answer"].replace("24", "21", 1) + ";", GRID, 10 / 11),
    ("format", "12", {"format": r"\d+"}, 1.0),
    ("format", "12;", {"format": r"\d+"}, 0.0),
    ("regex[^a,b=]", "a,b=c", {}, 1.0),
    ("length[8]", "four", {}, 0.5),
    ("length[2]", "four", {}, 0.0),
    ("code", "```python\ndef f(): return 3\n```", {"tests": "assert f() == 3"},
     1.0),
    ("code", "def f(): return 4", {"tests": "assert f() == 3"}, 0.0),
  ],
)  # fmt: skip
def test_verifiers(reward, completion, row, earned):
  (term,) = parse(reward)
  assert registry.call(term, "", completion, row) == pytest.approx(earned)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("countdwn=1", "there is no reward 'countdwn'; legal: code, countdown"),
    ("countdown=1,,", "name=weight"),
    ("length[4", "name=weight"),
    ("", "name=weight"),
    ("regex[(]=1", "no regular expression"),
    ("regex", "needs an expression"),
  ],
)
def test_names_that_are_none(text, message):
  with pytest.raises(ValueError, match=message.replace("[", r"\[")):
    parse(text)


@pytest.fixture
def own(tmp_path, monkeypatch):
  """A package of a user's with rewards that fail in every way."""
  (tmp_path / "mine.py").write_text(
    "import time\n"
    "def hangs(prompt, completion, row):\n"
    "  time.sleep(60 if completion == 'bad' else 0)\n"
    "  return 1.0\n"
    "def raises(prompt, completion, row):\n"
    "  return 1 / len(completion)\n"
    "def dies(prompt, completion, row):\n"
    "  import os\n"
    "  os._exit(completion == 'bad')\n"
    "def nan(prompt, completion, row, *, argument='1'):\n"
    "  return float('nan') if completion == 'bad' else float(argument)\n"
  )
  about = tmp_path / "mine-1.0.dist-info"
  about.mkdir()
  (about / "METADATA").write_text("Name: mine\nVersion: 1.0\n")
  names = ("hangs", "raises", "dies", "nan")
  (about / "entry_points.txt").write_text(
    "[dllm_jax.rewards]\n" + "".join(f"{n} = mine:{n}\n" for n in names)
  )
  monkeypatch.syspath_prepend(tmp_path)


def test_failures_are_those_of_a_sample(own):
  terms = parse("hangs=1,raises=2,nan[4]=0.5")
  with Rewards(terms, seconds=2.0, processes=2) as rewards:
    first = rewards.ask([Asked("", text, {}) for text in ("ok", "bad", "")])
    # Another batch is asked while the first one hangs.
    second = rewards.ask([Asked("", "ok", {})])
    good, bad, empty = first.wait()
    (again,) = second.wait()
  assert good == again
  assert good.total == 1 + 2 * 0.5 + 0.5 * 4
  assert good.parts == {"hangs": 1.0, "raises": 0.5, "nan[4]": 4.0}
  assert not good.failures
  assert bad.failures == {"hangs": "timeout", "nan[4]": "not finite"}
  assert bad.total == pytest.approx(2 / 3)
  assert bad.parts["hangs"] is None
  assert empty.failures == {"raises": "ZeroDivisionError"}
  assert math.isfinite(empty.total)


@pytest.mark.all
def test_a_process_that_dies_is_one_failure(own):
  with Rewards(parse("dies=1,length[4]=1"), processes=1) as rewards:
    (bad,) = rewards.ask([Asked("", "bad", {})]).wait()
    (more,) = rewards.ask([Asked("", "ok", {})]).wait()
  assert set(bad.failures) == {"dies"} and bad.parts["length[4]"] == 0.25
  assert more.parts["length[4]"] == 0.5

"""What answers earn: functions `(prompt, completion, row) -> float`.

`row` is the problem's own row: what a verifier reads of it is said in its
docstring. Nothing here imports jax: they run in processes of their own.
"""

from collections.abc import Mapping
import re
from typing import Any

from dllm_jax.evaluation.benchmarks import puzzles, sandbox

Row = Mapping[str, Any]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def number(prompt: str, completion: str, row: Row) -> float:
  """Returns 1 if the last number of an answer is `row["answer"]`'s, else 0."""
  plain = lambda text: text.replace(",", "").rstrip(".")
  found = _NUMBER.findall(completion)
  wanted = _NUMBER.findall(str(row["answer"]))
  return float(bool(found) and plain(found[-1]) == plain(wanted[-1]))


def countdown(prompt: str, completion: str, row: Row) -> float:
  """Returns 1 if steps reach `row["target"]` from `row["numbers"]`, else 0."""
  problem = puzzles.Countdown(
    numbers=tuple(row["numbers"]), target=row["target"]
  )
  return float(puzzles.solved(problem, completion))


def countdown_steps(prompt: str, completion: str, row: Row) -> float:
  """Returns the share of steps that are right, 1 if they reach the target.

  A step `a+b=c` is right if it is true and its numbers are there to be used.
  """
  left, right = list(row["numbers"]), 0
  steps = completion.split(puzzles.END)[0].split(",")
  for step in steps:
    found = puzzles.worked(step, left)
    if found is None:
      break
    left, right = found, right + 1
  whole = right == len(steps) and left == [row["target"]]
  return 1.0 if whole else 0.5 * right / max(len(row["numbers"]) - 1, right, 1)


def sudoku(prompt: str, completion: str, row: Row) -> float:
  """Returns 1 if an answer completes `row["given"]` by the rules, else 0."""
  return float(puzzles.solved(puzzles.Sudoku(given=row["given"]), completion))


def sudoku_cells(prompt: str, completion: str, row: Row) -> float:
  """Returns the share of the empty cells that are as in `row["answer"]`."""
  answer = completion.split(puzzles.END)[0]
  empty = [i for i, sign in enumerate(row["given"]) if sign == "0"]
  same = [answer[i : i + 1] == row["answer"][i] for i in empty]
  return sum(same) / max(len(same), 1)


def code(
  prompt: str, completion: str, row: Row, *, argument: str = "10"
) -> float:
  """Returns 1 if `before + completion + tests` reaches its end, else 0.

  `row` has `tests` and may have `before`; contained as in `dllm evaluate`.

  Args:
    argument: seconds that a program has.
  """
  fenced = re.search(r"```(?:python)?\n(.*?)```", completion, re.DOTALL)
  written = fenced[1] if fenced else completion
  program = f"{row.get('before', '')}{written}\n{row['tests']}\n"
  limits = sandbox.Limits(seconds=float(argument))
  return float(sandbox.run(program, limits).passed)


def format(
  prompt: str, completion: str, row: Row, *, argument: str = ""
) -> float:
  """Returns 1 if an answer as a whole is as a regular expression says, else 0.

  Args:
    argument: the expression; "" for `row["format"]`.
  """
  pattern = argument or row["format"]
  return float(re.fullmatch(pattern, completion, re.DOTALL) is not None)


def regex(
  prompt: str, completion: str, row: Row, *, argument: str = ""
) -> float:
  """Returns 1 if a regular expression is found in an answer, else 0.

  Args:
    argument: the expression.
  """
  return float(re.search(argument, completion) is not None)


def length(
  prompt: str, completion: str, row: Row, *, argument: str = "256"
) -> float:
  """Returns 1 for no signs, falling evenly to 0 for as many as are told.

  Args:
    argument: signs of an answer that earns nothing.
  """
  return max(0.0, 1.0 - len(completion) / float(argument))

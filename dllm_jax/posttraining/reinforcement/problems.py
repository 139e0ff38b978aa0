"""What is asked: prompts with the rows that verifiers read.

Puzzles are made here; a file of JSON lines has a `prompt`, or `messages` for the
tokenizer's chat template, and whatever else its rewards want of a row.
"""

from collections.abc import Iterator, Mapping, Sequence
import json
from typing import Any, NamedTuple

import numpy as np

from dllm_jax.core import paths
from dllm_jax.data.conversations.messages import normal
from dllm_jax.data.tokenizer import Tokenizer
from dllm_jax.evaluation.benchmarks import puzzles

_CELLS = r"[1-9]+"
_STEPS = r"(\d+[-+*/]\d+=\d+)(,\d+[-+*/]\d+=\d+)*"

# What verifiers read of a row.
_NEEDS = {
  "number": ("answer",),
  "countdown": ("numbers", "target"),
  "countdown_steps": ("numbers", "target"),
  "sudoku": ("given",),
  "sudoku_cells": ("given", "answer"),
  "code": ("tests",),
}


class Problem(NamedTuple):
  """A prompt and what is known of it.

  Attributes:
    tokens: the prompt's ids.
    prompt: its text.
    row: what verifiers read.
  """

  tokens: list[int]
  prompt: str
  row: Mapping[str, Any]


def load(
  name: str, tokenizer: Tokenizer, *, count: int, held_out: int, seed: int
) -> tuple[list[Problem], list[Problem]]:
  """Returns problems to learn from, and others.

  Args:
    name: puzzles that are made, `puzzles.KINDS`, or a file of JSON lines.
    tokenizer: text to tokens.
    count: how many to learn from; 0 for all of a file, 1000 puzzles.
    held_out: how many others, of a file its last ones.
    seed: of puzzles that are made.

  Raises:
    FileNotFoundError: there is no such file, and no such puzzle.
    ValueError: a line has no prompt, or there are too few.
  """
  if name in puzzles.KINDS:
    found = [
      _puzzle(p, tokenizer)
      for p in puzzles.generate(name, (count or 1000) + held_out, seed=seed)
    ]
  else:
    found = _read(name, tokenizer)
  if len(found) <= held_out:
    raise ValueError(
      f"{name} has {len(found)} problems, of which reinforce.held_out"
      f" {held_out} leaves none: lower it"
    )
  rest = len(found) - held_out
  return found[: min(count or rest, rest)], found[rest:]


def _puzzle(puzzle: puzzles.Puzzle, tokenizer: Tokenizer) -> Problem:
  row = {"answer": puzzle.answer}
  if isinstance(puzzle, puzzles.Sudoku):
    row |= {"given": puzzle.given, "format": _CELLS}
  else:
    row |= {
      "numbers": list(puzzle.numbers),
      "target": puzzle.target,
      "format": _STEPS,
    }
  tokens = [int(i) for i in tokenizer.encode(puzzle.question)]
  return Problem(tokens, puzzle.question, row)


def _read(name: str, tokenizer: Tokenizer) -> list[Problem]:
  path = paths.place(name)
  if not path.is_file():
    raise FileNotFoundError(
      f"no problems {name!r}: give a file of JSON lines with a prompt, or one"
      f" of {', '.join(puzzles.KINDS)}"
    )
  found = []
  lines = path.read_text(encoding="utf-8").splitlines()
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      text, tokens = _prompt(row, tokenizer)
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(
        f"{path}:{number} has no prompt ({error}): a line is an object with"
        " prompt, a text, or messages"
      ) from error
    found.append(Problem(tokens, text, row))
  return found


def _prompt(row: Any, tokenizer: Tokenizer) -> tuple[str, list[int]]:
  if "messages" not in row:
    text = row["prompt"]
    return text, [int(i) for i in tokenizer.prompt(text)]
  if not hasattr(tokenizer, "render"):
    raise ValueError("messages need a tokenizer with a chat template")
  text = tokenizer.render(normal(row["messages"]))
  return text, [int(i) for i in tokenizer.encode(text)]


def check(
  problems: Sequence[Problem], terms: Sequence[Any], *, room: int
) -> None:
  """Checks that problems can be asked and marked.

  Args:
    problems: all of them.
    terms: the rewards.
    room: tokens that a prompt may have.

  Raises:
    ValueError: a prompt is too long, or a verifier's columns are missing.
  """
  for number, problem in enumerate(problems):
    if len(problem.tokens) > room:
      raise ValueError(
        f"prompt {number} has {len(problem.tokens)} tokens and the canvas room"
        f" for {room}: raise config.data.length, lower reinforce.new_tokens, or"
        " leave it out"
      )
    for term in terms:
      needs = list(_NEEDS.get(term.name, ()))
      if term.name == "format" and not term.argument:
        needs = ["format"]
      missing = [name for name in needs if name not in problem.row]
      if missing:
        raise ValueError(
          f"the reward {term.name} reads {' and '.join(missing)} of a row, which"
          f" problem {number} has not: name a reward that these problems have a"
          " verifier for"
        )


def endless(count: int, seed: int) -> Iterator[int]:
  """Returns numbers of problems without end, shuffled anew in each epoch."""
  epoch = 0
  while True:
    yield from np.random.default_rng((seed, epoch)).permutation(count).tolist()
    epoch += 1


def end_of(name: str) -> str:
  """Returns the text that ends an answer to problems of a kind, or ""."""
  return puzzles.END if name in puzzles.KINDS else ""

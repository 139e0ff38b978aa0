"""Puzzles whose answers are checked by rules: Sudoku and Countdown.

A puzzle is one line of text, question then answer, so that any model of
characters can learn it:

    0030000040000324=2431314242131324;     Sudoku: the grid row by row, 0 is empty
    15,44,79,50=44-15=29,79-29=50;         Countdown: numbers, and last the target

Any grid or calculation that obeys the rules is right, whether or not it is the
one on file.
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import functools
import math
import operator
import random
import re
from typing import Protocol

from dllm_jax.core.paths import Path
from dllm_jax.evaluation.benchmarks import json_lines

END = ";"


class Puzzle(Protocol):
  """A question whose answers a rule can check.

  Attributes:
    question: the text up to where the answer begins.
    answer: one right answer; "" if none is known.
  """

  question: str
  answer: str

  def check(self, answer: str) -> bool:
    """Returns whether an answer is right."""

  def template(self) -> str:
    """Returns the answer's slots: a known sign, or "?" for one wanted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sudoku:
  """A Sudoku grid, in which each row, column and box holds each digit once.

  Attributes:
    given: the cells row by row, "0" where empty; 16 or 81 of them.
    answer: a solution, or "".
  """

  given: str
  answer: str = ""

  def __post_init__(self):
    side = math.isqrt(len(self.given))
    if side * side != len(self.given) or side not in (4, 9):
      raise ValueError(
        f"a Sudoku has 16 or 81 cells, not {len(self.given)}: {self.given!r}"
      )
    legal = "0123456789"[: side + 1]
    if set(self.given) - set(legal):
      raise ValueError(f"cells must be digits of {legal}, not {self.given!r}")
    if self.answer and not self.check(self.answer):
      raise ValueError(f"{self.answer!r} is no solution of {self.given!r}")

  @property
  def question(self) -> str:
    """The grid and an equals sign."""
    return f"{self.given}="

  def check(self, answer: str) -> bool:
    """Returns whether an answer completes the given cells by the rules."""
    cells = "".join(answer.split())
    if len(cells) != len(self.given):
      return False
    side = math.isqrt(len(cells))
    digits = set("123456789"[:side])
    kept = all(g in ("0", c) for g, c in zip(self.given, cells, strict=True))
    return kept and all(
      {cells[i] for i in unit} == digits for unit in _units(side)
    )

  def template(self) -> str:
    """Returns the grid with "?" in its empty cells."""
    return self.given.replace("0", "?")


@functools.cache
def _units(side: int) -> tuple[tuple[int, ...], ...]:
  """Returns the cells of each row, column and box."""
  box = math.isqrt(side)
  rows = [tuple(range(r * side, (r + 1) * side)) for r in range(side)]
  columns = [tuple(range(c, side * side, side)) for c in range(side)]
  boxes = [
    tuple((r + i) * side + c + j for i in range(box) for j in range(box))
    for r in range(0, side, box)
    for c in range(0, side, box)
  ]
  return tuple(rows + columns + boxes)


@functools.cache
def _peers(side: int) -> tuple[tuple[int, ...], ...]:
  """Returns for each cell the others that share a unit with it."""
  return tuple(
    tuple({j for unit in _units(side) if i in unit for j in unit} - {i})
    for i in range(side * side)
  )


def solutions(given: str, limit: int = 2) -> list[str]:
  """Returns at most `limit` solutions of a grid, by search."""
  side = math.isqrt(len(given))
  cells, found = [int(c) for c in given], []
  peers = _peers(side)

  def search() -> None:
    best, options = -1, None
    for i, cell in enumerate(cells):
      if cell:
        continue
      legal = set(range(1, side + 1)) - {cells[j] for j in peers[i]}
      if options is None or len(legal) < len(options):
        best, options = i, legal
        if len(legal) < 2:
          break
    if options is None:
      found.append("".join(map(str, cells)))
      return
    for digit in sorted(options):
      cells[best] = digit
      search()
      if len(found) >= limit:
        break
    cells[best] = 0

  search()
  return found


def sudoku(side: int, rng: random.Random, *, empty: int) -> Sudoku:
  """Returns a grid with one solution only.

  Args:
    side: 4 or 9.
    rng: where the draw comes from.
    empty: cells to empty at most; fewer if more would allow a second solution.
  """
  solution = _grid(side, rng)
  cells = list(solution)
  for i in rng.sample(range(side * side), side * side):
    if cells.count("0") == empty:
      break
    kept, cells[i] = cells[i], "0"
    if len(solutions("".join(cells))) > 1:
      cells[i] = kept
  return Sudoku(given="".join(cells), answer=solution)


def _grid(side: int, rng: random.Random) -> str:
  """Returns a full grid: digits, bands and lines of a pattern, shuffled."""
  box = math.isqrt(side)

  def shuffled() -> list[int]:
    bands = rng.sample(range(box), box)
    return [b * box + i for b in bands for i in rng.sample(range(box), box)]

  digits = rng.sample("123456789"[:side], side)
  rows, columns = shuffled(), shuffled()
  swap = rng.random() < 0.5
  cell = lambda r, c: digits[(r * box + r // box + c) % side]
  return "".join(
    cell(c, r) if swap else cell(r, c) for r in rows for c in columns
  )


_OPERATIONS = {
  "+": operator.add,
  "-": operator.sub,
  "*": operator.mul,
  "/": lambda a, b: a // b if b and a % b == 0 else None,
}
_STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Countdown:
  """A target to be reached from numbers, each used once, in steps `a+b=c`.

  Attributes:
    numbers: what may be used; a step's result takes the place of its two.
    target: the last step's result.
    answer: steps with commas between, or "".
  """

  numbers: tuple[int, ...]
  target: int
  answer: str = ""

  def __post_init__(self):
    if self.answer and not self.check(self.answer):
      raise ValueError(
        f"{self.answer!r} does not reach {self.target} from {self.numbers}"
      )

  @property
  def question(self) -> str:
    """The numbers, the target and an equals sign."""
    return ",".join(map(str, (*self.numbers, self.target))) + "="

  def check(self, answer: str) -> bool:
    """Returns whether steps use every number once and end at the target."""
    left = list(self.numbers)
    for step in answer.strip().split(","):
      left = worked(step, left)
      if left is None:
        return False
    return left == [self.target]

  def template(self) -> str:
    """Returns no slots: an answer's length is not known."""
    return ""


def worked(step: str, left: Sequence[int]) -> list[int] | None:
  """Returns what numbers are left after a step; None if it is wrong."""
  found = _STEP.fullmatch(step.strip())
  if found is None:
    return None
  a, b, result = int(found[1]), int(found[3]), int(found[4])
  left = list(left)
  for number in (a, b):
    if number not in left:
      return None
    left.remove(number)
  if _OPERATIONS[found[2]](a, b) != result:
    return None
  return [*left, result]


def countdown(count: int, rng: random.Random, *, most: int = 99) -> Countdown:
  """Returns numbers from 1 to `most` and a target that they reach."""
  while True:
    numbers = [rng.randint(1, most) for _ in range(count)]
    left, steps = list(numbers), []
    while len(left) > 1:
      a, b = sorted(rng.sample(left, 2), reverse=True)
      sign = rng.choice("+-*/")
      result = _OPERATIONS[sign](a, b)
      if not result or result > 9999:
        break
      left.remove(a)
      left.remove(b)
      left.append(result)
      steps.append(f"{a}{sign}{b}={result}")
    if len(left) == 1 and left[0] <= most:
      return Countdown(
        numbers=tuple(numbers), target=left[0], answer=",".join(steps)
      )


KINDS = ("sudoku4", "sudoku9", "countdown3", "countdown4", "countdown5")


def generate(kind: str, count: int, *, seed: int = 0) -> list[Puzzle]:
  """Returns puzzles of a kind, no question twice.

  Raises:
    ValueError: there is no such kind.
  """
  if kind not in KINDS:
    raise ValueError(f"unknown puzzle {kind!r}; legal: {', '.join(KINDS)}")
  rng, found = random.Random(f"{kind} {seed}"), {}
  while len(found) < count:
    size = int(kind[-1])
    if kind.startswith("sudoku"):
      empty = rng.randint(4, 11) if size == 4 else rng.randint(20, 45)
      puzzle = sudoku(size, rng, empty=empty)
    else:
      puzzle = countdown(size, rng)
    found.setdefault(puzzle.question, puzzle)
  return list(found.values())


def read(path: Path) -> list[Puzzle]:
  """Returns the puzzles of a file.

  A `.csv` has the columns Puzzle and Solution; a `.jsonl` has `input` and
  `output`, a grid in lines or numbers with commas. A Countdown's input ends with
  the target, unless its output is one number, which is then the target.

  Raises:
    ValueError: a line is something else; the message names file and line.
  """
  found = []
  for number, question, answer in _lines(path):
    try:
      found.append(_puzzle(question, answer))
    except ValueError as error:
      raise ValueError(f"{path}:{number}: {error}") from error
  if not found:
    raise ValueError(f"{path} has no puzzle in it")
  return found


def _lines(path: Path) -> Iterator[tuple[int, str, str]]:
  if path.suffix != ".csv":
    for number, row in json_lines.rows(path, ("input", "output")):
      yield number, str(row["input"]), str(row["output"])
    return
  lines = path.read_text(encoding="utf-8").splitlines()
  for number, line in enumerate(lines, start=1):
    parts = line.split(",")
    if len(parts) != 2:
      raise ValueError(f"{path}:{number} must be Puzzle,Solution")
    if parts[0] != "Puzzle":
      yield number, *parts


def _puzzle(question: str, answer: str) -> Puzzle:
  if "," not in question:
    strip = lambda text: "".join(text.split())
    return Sudoku(given=strip(question), answer=strip(answer))
  try:
    numbers = [int(part) for part in question.split(",")]
    if answer.strip().isdigit():
      return Countdown(numbers=tuple(numbers), target=int(answer))
  except ValueError as error:
    raise ValueError(
      f"numbers with commas expected, not {question!r}"
    ) from error
  return Countdown(
    numbers=tuple(numbers[:-1]), target=numbers[-1], answer=answer.strip()
  )


def lines(puzzles: Iterable[Puzzle]) -> list[str]:
  """Returns puzzles with their answers as lines to train on."""
  return [f"{p.question}{p.answer}{END}" for p in puzzles]


def solved(puzzle: Puzzle, written: str) -> bool:
  """Returns whether what was written after a question answers it."""
  return puzzle.check(written.split(END)[0])

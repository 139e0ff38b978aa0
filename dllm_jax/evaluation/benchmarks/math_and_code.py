"""Published problems of mathematics and code: how they are asked and marked.

GSM8K is marked by the number that an answer ends with; HumanEval and MBPP by
running what was written with the problem's own tests, contained (`sandbox`).
"""

import dataclasses
import re
from typing import ClassVar

from dllm_jax.core.paths import Path
from dllm_jax.evaluation.benchmarks import json_lines, sandbox
from dllm_jax.evaluation.likelihood.contexts import cut


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mark:
  """What an answer is worth.

  Attributes:
    right: whether it counts.
    reason: why not, or "passed".
  """

  right: bool
  reason: str


# GSM8K's own form of an answer, and the last number wherever it stands: the
# filters "strict-match" and "flexible-extract" of the lm-evaluation-harness.
_STRICT = re.compile(r"#### (\-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


def strict_number(text: str) -> str | None:
  """Returns the first number after "#### ", or None."""
  found = _STRICT.search(text)
  return None if found is None else _plain(found[1])


def last_number(text: str) -> str | None:
  """Returns the last number in a text, or None."""
  found = _FLEXIBLE.findall(text)
  return None if not found else _plain(next(x for x in found[-1] if x))


def _plain(number: str) -> str:
  """Returns a number without signs of currency, thousands and the final stop."""
  return re.sub(r"[,$]", "", number).rstrip(".")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GSM8K:
  """A problem in words whose answer is a number.

  Attributes:
    name: its number in the file.
    prompt: the text before the answer, examples included.
    answer: the number wanted.
    strict: whether only a number after "#### " counts.
  """

  name: str
  prompt: str
  answer: str
  strict: bool = True

  stops: ClassVar[tuple[str, ...]] = ("Question:", "</s>", "<|im_end|>")

  def marked(self, written: str) -> Mark:
    """Returns the mark of an answer."""
    written = cut(written, self.stops)
    found = strict_number(written) if self.strict else last_number(written)
    if found is None:
      return Mark(right=False, reason="no number")
    right = found == self.answer
    return Mark(right=right, reason="passed" if right else "another number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Code:
  """A function to be written, and tests.

  Attributes:
    name: the problem's name.
    prompt: what the model is given.
    before: the part of the program that stands before what is written.
    tests: the part that stands after.
    stops: texts at which what is written ends.
  """

  name: str
  prompt: str
  before: str
  tests: str
  stops: tuple[str, ...]

  def program(self, written: str) -> str:
    """Returns the program to run."""
    return f"{self.before}{cut(written, self.stops)}\n{self.tests}\n"

  def marked(self, written: str, limits: sandbox.Limits) -> Mark:
    """Returns the mark of what was written, by running it, contained."""
    verdict = sandbox.run(self.program(written), limits)
    return Mark(right=verdict.passed, reason=verdict.reason)


Exam = GSM8K | Code


def gsm8k(
  path: Path,
  *,
  strict: bool = True,
  examples: Path | None = None,
  shots: int = 0,
) -> list[GSM8K]:
  """Returns the problems of a file with `question` and `answer`.

  Args:
    path: the file.
    strict: whether only a number after "#### " counts.
    examples: the file that examples come from, its first rows.
    shots: examples before each question, 0 to what the file has.
  """
  fields = ("question", "answer")
  asked = "Question: {question}\nAnswer:"
  before = ""
  if shots:
    if examples is None:
      raise ValueError("shots need --examples, a file of the same form")
    for _, row in list(json_lines.rows(examples, fields))[:shots]:
      before += f"{asked.format(**row)} {row['answer']}\n\n"
  found = []
  for number, row in json_lines.rows(path, fields):
    wanted = strict_number(row["answer"])
    if wanted is None:
      raise ValueError(f"{path}:{number}: the answer has no number after ####")
    found.append(
      GSM8K(
        name=str(number),
        prompt=before + asked.format(**row),
        answer=wanted,
        strict=strict,
      )  # fmt: skip
    )
  return found


def humaneval(path: Path) -> list[Code]:
  """Returns the problems of HumanEval's file (arXiv:2107.03374), zero-shot."""
  fields = ("task_id", "prompt", "entry_point", "test")
  return [
    Code(
      name=row["task_id"],
      prompt=row["prompt"],
      before=row["prompt"],
      tests=f"{row['test']}\ncheck({row['entry_point']})",
      stops=("\nclass", "\ndef", "\n#", "\nif", "\nprint", "```"),
    )
    for _, row in json_lines.rows(path, fields)
  ]


def mbpp(path: Path, *, shots: int = 3) -> list[Code]:
  """Returns the test problems (11 to 510) of MBPP's file (arXiv:2108.07732).

  Asked as published: tasks 2, 3, 4 of the same file as examples, the three
  asserts in the prompt, the answer between [BEGIN] and [DONE].
  """
  fields = ("task_id", "text", "code", "test_list", "test_setup_code")
  found = [row for _, row in json_lines.rows(path, fields)]

  def asked(row) -> str:
    tests = "\n".join(row["test_list"])
    return (
      "You are an expert Python programmer, and here is your task: "
      f"{row['text']} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )

  examples = [r for r in found if r["task_id"] in (2, 3, 4)][:shots]
  before = "".join(f"{asked(r)}{r['code']}\n[DONE]\n\n" for r in examples)
  tested = [r for r in found if 11 <= r["task_id"] <= 510] or found
  return [
    Code(
      name=str(row["task_id"]),
      prompt=before + asked(row),
      before="",  # set-up uses what was written, so it comes after it
      tests="\n".join([row["test_setup_code"], *row["test_list"]]),
      stops=("[DONE]", "```"),
    )
    for row in tested
  ]

"""Asking a model about facts: exact match of the answer, with its error.

The text that a model is trained on has one statement a row, filled up with line
breaks, one token each. An answer counts if its tokens are exactly those wanted:
in the slots left open, or from the end of the prompt on.
"""

from collections.abc import Callable, Iterator, Sequence
import math
import re
from typing import Any

import numpy as np

from dllm_jax.data.tokenizer import make_tokenizer, Tokenizer
from dllm_jax.evaluation.benchmarks.facts import Facts, Question
from dllm_jax.evaluation.likelihood import contexts

# A word with the space before it, a number, any other sign, a line break. Scripts
# without spaces are taken sign by sign.
_WORD = r" ?[A-Za-z\u00C0-\u024F]+| ?[0-9]+| ?[^\sA-Za-z0-9\u00C0-\u024F]|\s"
_FILL = "\n"

Template = list[int | None]
Answer = Callable[[Sequence[Template]], list[list[int]]]
"""Templates to finished rows of token ids."""


def words(facts: Facts) -> str:
  """Returns a `tokenizer.json` of the words that occur in facts.

  Decoding joins the tokens again, so that no text is changed.
  """
  import tokenizers  # noqa: PLC0415  Slow to import; most uses do without.
  from tokenizers import decoders, models, pre_tokenizers  # noqa: PLC0415

  found = {_FILL}
  for text in _texts(facts):
    found.update(re.findall(_WORD, text))
  vocabulary = {word: i for i, word in enumerate(sorted(found))}
  vocabulary["<unknown>"] = len(vocabulary)
  tokenizer = tokenizers.Tokenizer(
    models.WordLevel(vocabulary, unk_token="<unknown>")
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Split(
    tokenizers.Regex(_WORD), "isolated"
  )
  tokenizer.decoder = decoders.Fuse()
  return tokenizer.to_str(pretty=True)


def tokenizer(path: str) -> Tokenizer:
  """Returns the tokenizer of a `tokenizer.json`."""
  return make_tokenizer(path, [])


def _texts(facts: Facts) -> list[str]:
  whole = [q.before + q.answer + q.after for q in facts.questions]
  return [*facts.statements, *whole]


def row_length(facts: Facts, tokenizer: Tokenizer) -> int:
  """Returns the tokens of the longest text, and a line break, in fours."""
  longest = max(len(tokenizer.encode(text)) for text in _texts(facts)) + 1
  return -(-longest // 4) * 4


def training_text(facts: Facts, tokenizer: Tokenizer, length: int) -> str:
  """Returns one text of which each `length` tokens are one statement."""
  rows = []
  for statement in facts.statements:
    used = len(tokenizer.encode(statement))
    rows.append(statement + _FILL * (length - used))
  return "".join(rows)


def ask(
  questions: Sequence[Question],
  answer: Answer,
  tokenizer: Tokenizer,
  *,
  length: int,
) -> list[bool]:
  """Returns whether each question was answered, in one batch.

  Args:
    questions: what to ask.
    answer: the model.
    tokenizer: text to tokens.
    length: slots of a row.
  """
  (fill,) = tokenizer.encode(_FILL)
  templates, wanted = [], []
  for question in questions:
    before, reply = contexts.divided(
      tokenizer.encode, question.before, question.answer
    )
    if question.form == "infill":
      row = before + [None] * len(reply)
      row += [int(i) for i in tokenizer.encode(question.after)]
      row += [int(fill)] * (length - len(row))
    else:
      row = before + [None] * (length - len(before))
    templates.append(row)
    wanted.append((len(before), reply))
  rows = answer(templates)
  return [
    row[start : start + len(reply)] == reply
    for row, (start, reply) in zip(rows, wanted, strict=True)
  ]


def cells(
  questions: Sequence[Question], right: Sequence[bool]
) -> Iterator[dict[str, Any]]:
  """Yields the accuracy of each group, form and direction.

  Questions of one fact stand or fall together, so the standard error is that of
  a mean over facts; the interval is Wilson's for as many trials as facts, which
  says something where all or none were right.
  """
  found: dict[tuple, dict[str, list[bool]]] = {}
  for question, good in zip(questions, right, strict=True):
    key = (question.group, question.form, question.direction)
    found.setdefault(key, {}).setdefault(question.fact, []).append(good)
  for (group, form, direction), facts in found.items():
    means = np.asarray([np.mean(x) for x in facts.values()])
    accuracy, n = float(means.mean()), len(means)
    yield {
      "group": group,
      "form": form,
      "direction": direction,
      "accuracy": accuracy,
      "standard_error": standard_error(means),
      "interval_95": wilson(accuracy, n),
      "facts": n,
      "questions": sum(map(len, facts.values())),
    }


def standard_error(values: Sequence[float]) -> float | None:
  """Returns the standard error of a mean; None for a single value."""
  if len(values) < 2:
    return None
  return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
  """Returns Wilson's interval of a share among n independent trials.

  (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4 n^2)) / (1 + z^2 / n), by
  default at 95 %.
  """
  middle = share + z * z / (2 * n)
  half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
  scale = 1 + z * z / n
  return (
    max(0.0, (middle - half) / scale),
    min(1.0, (middle + half) / scale),
  )

"""`dllm decide`: answers questions about a text by labels, in one network call."""

from collections.abc import Mapping
import json
from typing import Any

from dllm_jax.cli import command as commands
from dllm_jax.core import paths


def _define(flag: commands.Flags) -> None:
  flag.path("workdir", None, "the run that decides")
  flag.string("context", "", "the text that is asked about")
  flag.multi_string(
    "question",
    [],
    "what is asked, with labels behind it if they are not yes and no: "
    "'Which colour? [red; blue]'; may be repeated",
  )
  flag.path(
    "fit",
    "",
    "a .jsonl of objects with context, question, labels and answer, by which a "
    "temperature is fitted and kept in the run",
  )
  flag.use_ema()


def _run(argv: list[str]) -> Mapping[str, Any]:
  values = commands.parse(COMMAND, argv)
  workdir = commands.required(values, "workdir", "runs/mine")
  if bool(values.fit) == bool(values.question):
    raise commands.UsageError(
      "give --question, with --context, or --fit=FILE: one of the two"
    )
  commands.join()
  from dllm_jax.run import decisions  # pylint: disable=g-import-not-at-top
  from dllm_jax.run.run import Run  # pylint: disable=g-import-not-at-top

  questions = [_question(text) for text in values.question]
  known = _known(values.fit) if values.fit else []
  run = Run.open(workdir)
  if known:
    asked = [(context, [question]) for context, question, _ in known]
    truth = [[answer] for _, _, answer in known]
    return decisions.fit(run, asked, truth, use_ema=values.use_ema)
  answers = decisions.decide(
    run, values.context, questions, use_ema=values.use_ema
  )
  said = []
  for question, answer in zip(questions, answers, strict=True):
    best = question.labels[answer.best]
    print(
      f"{question.instructions} {best} ({answer.confidence:.3f})", flush=True
    )
    said.append({
      "question": question.instructions,
      "answer": best,
      "confidence": answer.confidence,
      "mass": answer.mass,
      "probabilities": dict(
        zip(question.labels, answer.probabilities, strict=True)
      ),
    })
  return {"answers": said}


def _question(text: str):
  """Returns the question that a flag asks."""
  from dllm_jax.sampling.decisions.layout import Question  # pylint: disable=g-import-not-at-top

  bare, bracket, labels = text.rstrip().removesuffix("]").rpartition("[")
  if not bracket or not text.rstrip().endswith("]"):
    return Question(instructions=text)
  labels = tuple(label.strip() for label in labels.split(";"))
  return Question(instructions=bare.strip(), labels=labels)


def _known(path: str):
  """Returns (context, question, right label) of each line of a file."""
  from dllm_jax.sampling.decisions.layout import Question  # pylint: disable=g-import-not-at-top

  found = []
  file = paths.place(path)
  if not file.is_file():
    raise commands.UsageError(
      f"--fit={path} is no file: write an object with context, question, labels"
      " and answer on each line of one"
    )
  for i, line in enumerate(file.read_text(encoding="utf-8").splitlines()):
    try:
      row = json.loads(line)
      question = Question(
        instructions=row["question"], labels=tuple(row["labels"])
      )
      found.append((
        row.get("context", ""),
        question,
        question.labels.index(row["answer"]),
      ))
    except (KeyError, TypeError, ValueError) as error:
      raise commands.UsageError(
        f"line {i + 1} of {path} is no question with its answer ({error}): write"
        ' {"context": "...", "question": "...", "labels": ["a", "b"], "answer":'
        ' "a"}'
      ) from None
  return found


COMMAND = commands.Command(
  name="decide",
  summary="Answers questions about a text by labels, in one network call.",
  define=_define,
  run=_run,
)

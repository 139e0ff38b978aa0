"""`--task=reversal`: facts told in one direction, asked in both.

A masked diffusion model and an autoregressive one of the same size are trained on
the same statements in the same order, or taken as they are, and asked forward and
in reverse (`facts`). The autoregressive one is asked by prompts only: it cannot
see what comes after.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Any

import jax

from dllm_jax.core import check
from dllm_jax.core.paths import Path
from dllm_jax.evaluation.benchmarks import facts as facts_lib
from dllm_jax.evaluation.benchmarks import finetune, recall
from dllm_jax.evaluation.benchmarks.facts import Facts
from dllm_jax.evaluation.tasks.registry import option, Setting, Task
from dllm_jax.plots import bar_plot
from dllm_jax.run.run import Run

# The form in which each is asked for the summary.
_MODELS = {"diffusion": "infill", "autoregressive": "prompt"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reversal:
  """What `--task=reversal` is told.

  Attributes: as their help says.
  """

  facts: str = option(
    "synthetic",
    "'synthetic' (made-up people), a folder in the form of 'The Reversal Curse' "
    "(*_prompts_train.jsonl, *_prompts_test.jsonl), or couplets (.tsv, .json)",
    path=True,
  )
  people: int = option(16, "made-up people in each of the three groups")
  limit: int = option(0, "at most so many couplets of a file; 0 for all")
  seed: int = option(0, "the seed of made-up facts")
  steps: int = option(0, "training steps of each model; 0 for the recipe's")
  recipe: str = option(
    "reversal", "the configuration of both models", path=True
  )
  objective: str = option("mdlm", "the diffusion model's objective")
  diffusion: str = option(
    "", "the run of a diffusion model, not to train one", path=True
  )
  autoregressive: str = option(
    "", "the run of an autoregressive model", path=True
  )
  at_once: int = option(128, "questions in a batch")

  def __post_init__(self):
    check.at_least(self, 1, "people", "at_once", prefix="--")
    check.at_least(self, 0, "steps", "limit", prefix="--")


def _run(setting: Setting, options: Reversal) -> Mapping[str, Any]:
  made = options.facts == "synthetic"
  facts = (
    facts_lib.synthetic(facts=options.people, seed=options.seed)
    if made
    else facts_lib.read(options.facts, limit=options.limit)
  )
  runs = {model: _given(model, options) for model in _MODELS}
  missing = [model for model, run in runs.items() if run is None]
  lessons = [_lesson(model, facts, setting, options) for model in missing]
  try:
    taught = finetune.teach(lessons, progress=setting.progress)
  except finetune.InterruptedTask as stop:
    return {"interrupted": True, "message": str(stop)}
  runs |= zip(missing, taught, strict=True)
  rows, protocols = [], {}
  for model, run in runs.items():
    found, protocols[model] = _asked(model, run, facts, setting, options)
    rows += found
  result = {
    "interrupted": False,
    "rows": rows,
    "summary": {model: _summary(model, rows) for model in _MODELS},
    "facts": len({(q.group, q.fact) for q in facts.questions}),
    "statements": len(facts.statements),
    "protocol": protocols,
  }
  if jax.process_index() == 0:
    result |= _write(result, setting.workdir)
  return result


def _given(model: str, options: Reversal) -> Run | None:
  """Returns the run of a model that was given, if one was.

  Raises:
    ValueError: it is of another kind.
  """
  given = getattr(options, model)
  if not given:
    return None
  run = Run.open(given)
  causal = run.objective.block_length == 1
  if causal != (model == "autoregressive"):
    raise ValueError(
      f"--{model}={given} holds a run of {run.resolved.objective.name}; give "
      f"one of {'an autoregressive' if not causal else 'a masked'} model"
    )
  return run


def _lesson(
  model: str, facts: Facts, setting: Setting, options: Reversal
) -> finetune.Lesson:
  """Returns what a model is trained on: the facts."""
  folder = setting.workdir / "facts"
  tokenizer = finetune.kept(folder, "words", recall.words(facts), ".json")
  words = recall.tokenizer(tokenizer)
  length = recall.row_length(facts, words)
  text = recall.training_text(facts, words, length)
  return finetune.lesson(
    setting.workdir / model,
    recipe=options.recipe,
    objective=options.objective if model == "diffusion" else model,
    text=finetune.kept(folder, "statements", text, ".txt"),
    tokenizer=tokenizer,
    length=length,
    steps=options.steps,
  )


def _asked(
  model: str, run: Run, facts: Facts, setting: Setting, options: Reversal
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """Returns the accuracies of a model and the protocol that they follow."""
  sampler = finetune.greedy(run, setting)
  length = run.config.data.length
  questions = [
    q
    for q in facts.questions
    if model != "autoregressive" or q.form == "prompt"
  ]
  ledger = finetune.about(run, setting).ledger(
    "reversal",
    {
      "task": "reversal",
      "model": str(run.workdir),
      "facts": facts.source,
      "questions": finetune.digest(*map(repr, questions)),
      "match": "exact, in tokens",
      "answer_length": "told for infill; open for prompt",
      "slots": length,
      "sampler": dataclasses.asdict(sampler),
    },
  )

  def answer(templates):
    return finetune.fill(
      run,
      templates,
      length=length,
      sampler=sampler,
      use_ema=setting.use_ema,
      rows=options.at_once,
    )[0]

  right = ledger.each(
    range(len(questions)),
    lambda part: recall.ask(
      [questions[i] for i in part], answer, run.tokenizer, length=length
    ),
    at_once=options.at_once,
    unit="question",
  )
  rows = [{"model": model} | cell for cell in recall.cells(questions, right)]
  return rows, ledger.protocol


def _summary(model: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns the accuracy over facts that were taught in one order only."""
  summary: dict[str, Any] = {"form": _MODELS[model]}
  for direction in ("forward", "reverse"):
    found = [
      row
      for row in rows
      if row["model"] == model
      and row["form"] == _MODELS[model]
      and row["direction"] == direction
      and not row["group"].startswith("both")
    ]
    facts = sum(row["facts"] for row in found)
    if facts:
      mean = sum(row["accuracy"] * row["facts"] for row in found) / facts
      squares = sum(
        ((row["standard_error"] or 0.0) * row["facts"]) ** 2 for row in found
      )
      summary[direction] = {
        "accuracy": mean,
        "standard_error": squares**0.5 / facts,
        "interval_95": recall.wilson(mean, facts),
        "facts": facts,
      }
  return summary


def _table(result: Mapping[str, Any]) -> str:
  lines = [
    "| model | asked by | taught | direction | exact match | standard error | "
    "95 % interval | facts | questions |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for row in sorted(
    result["rows"],
    key=lambda r: (r["model"], r["form"], r["group"], r["direction"]),
  ):
    low, high = row["interval_95"]
    error = row["standard_error"]
    lines.append(
      f"| {row['model']} | {row['form']} | {row['group'].replace('_', ' ')} "
      f"| {row['direction']} | {row['accuracy']:.3f} "
      f"| {'' if error is None else f'{error:.3f}'} | {low:.3f} to {high:.3f} "
      f"| {row['facts']} | {row['questions']} |"
    )
  return "\n".join(lines) + "\n"


def _write(result: Mapping[str, Any], output: Path) -> dict[str, str]:
  """Writes reversal.json, reversal.md and reversal.svg."""
  bars = {
    f"{model}, by {summary['form']}": {
      direction: (
        summary[direction]["accuracy"], summary[direction]["standard_error"]
      )
      for direction in ("forward", "reverse")
      if direction in summary
    }
    for model, summary in result["summary"].items()
  }  # fmt: skip
  plot = bar_plot(bars, y_label="exact match", high=1.0)
  files = {
    "json": json.dumps(result, indent=2) + "\n",
    "md": _table(result),
    "svg": plot,
  }
  for suffix, text in files.items():
    (output / f"reversal.{suffix}").write_text(text, encoding="utf-8")
  return {
    "table": str(output / "reversal.md"),
    "plot": str(output / "reversal.svg"),
  }


def _text(result: Mapping[str, Any]) -> str:
  if "message" in result:
    return result["message"]
  lines = [_table(result)]
  for model, summary in result["summary"].items():
    told = [
      f"{direction} {summary[direction]['accuracy']:.3f} +- "
      f"{summary[direction]['standard_error']:.3f}"
      for direction in ("forward", "reverse")
      if direction in summary
    ]
    lines.append(f"{model}, facts taught in one order: {', '.join(told)}")
  return "\n".join(lines)


TASK = Task(
  summary="the reversal curse: facts told in one direction, asked in both",
  run=_run,
  text=_text,
  options=Reversal,
  opens=False,
)

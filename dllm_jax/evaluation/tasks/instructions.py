"""`--task=instructions`: what fine-tuning on conversations teaches.

A small model is taught one group of instructions from its first step
(`benchmarks/instructions`), then another group, by training all of it and by
training adapters alone. Each is asked held-out questions of both groups; an answer
is right if it is the same text. A run with a chat template can be asked instead.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Any

import jax

from dllm_jax.config import config as configs
from dllm_jax.core import check
from dllm_jax.evaluation.benchmarks import finetune
from dllm_jax.evaluation.benchmarks import instructions as lib
from dllm_jax.evaluation.benchmarks.recall import wilson
from dllm_jax.evaluation.tasks.registry import option, Setting, Task
from dllm_jax.run.begin import begin
from dllm_jax.run.run import Run
from dllm_jax.training.metrics import latest

_GROUPS = {"first": lib.FIRST, "later": lib.LATER}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instructions:
  """What `--task=instructions` is told.

  Attributes: as their help says.
  """

  run: str = option(
    "", "a run with a chat template to ask, not to train any", path=True
  )
  recipe: str = option(
    "finetune_smoke", "the configuration of the models", path=True
  )
  taught: int = option(20_000, "conversations of each group")
  questions: int = option(300, "held-out questions of each group")
  rank: int = option(8, "rank of the adapters")
  learning_rate: float = option(0.005, "learning rate of fine-tuning")
  seed: int = option(0, "the seed of the conversations")
  at_once: int = option(150, "questions in a batch")

  def __post_init__(self):
    check.at_least(
      self, 1, "taught", "questions", "rank", "at_once", prefix="--"
    )


def _run(setting: Setting, options: Instructions) -> Mapping[str, Any]:
  rows, seconds = [], {}
  try:
    for name, run, took in _models(setting, options):
      seconds[name] = took
      for group, kinds in _GROUPS.items():
        rows += _asked(name, run, group, kinds, setting, options)
  except finetune.InterruptedTask as stop:
    return {"interrupted": True, "message": str(stop)}
  result = {"interrupted": False, "rows": rows, "seconds": seconds}
  if jax.process_index() == 0:
    path = setting.workdir / "instructions.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
  return result


def _models(setting: Setting, options: Instructions):
  """Yields each model's name, its run, and the seconds that it trained."""
  if options.run:
    yield "given", Run.open(options.run), 0.0
    return
  folder = setting.workdir / "data"
  tokenizer = lib.write_tokenizer(folder / "tokenizer")
  paths = {}
  for group, kinds in _GROUPS.items():
    paths[group] = folder / f"{group}-{options.taught}-{options.seed}.jsonl"
    if not paths[group].exists():
      asked = lib.questions(kinds, options.taught, seed=options.seed)
      lib.write(asked, paths[group])

  def resolved(group: str, **sections: Mapping[str, Any]):
    found = configs.load(options.recipe)
    found.data.update({"path": str(paths[group]), "tokenizer": tokenizer})
    for section, fields in sections.items():
      found[section].update(fields)
    found.logging.progress = setting.progress
    return found

  base = Run.create(resolved("first"), setting.workdir / "base")
  yield "base", base, _trained(base)
  rate = {"learning_rate": options.learning_rate}
  tuned = {
    "full": resolved("later", optimizer=rate),
    "lora": resolved(
      "later",
      optimizer=rate,
      model={"adapter": {"rank": options.rank, "alpha": 2.0 * options.rank}},
    ),
  }
  for name, config in tuned.items():
    run = begin(base, setting.workdir / name, config, None)
    yield name, run, _trained(run)


def _trained(run: Run) -> float:
  """Trains a run to its end; returns the seconds of its steps."""
  print(f"{run.workdir.name}: {run.describe()}", flush=True)
  summary = run.train()
  if summary["interrupted"]:
    raise finetune.InterruptedTask(
      f"{run.workdir} was stopped and saved; the same command continues"
    )
  return latest(run.workdir, ("wall_seconds",)).get("wall_seconds", 0.0)


def _asked(
  name: str,
  run: Run,
  group: str,
  kinds: Sequence[str],
  setting: Setting,
  options: Instructions,
) -> list[dict[str, Any]]:
  """Returns the exact match of a model for each kind."""
  questions = lib.questions(
    kinds, options.questions, seed=options.seed, held_out=True
  )
  sampler = finetune.greedy(run, setting)
  ledger = finetune.about(run, setting).ledger(
    "instructions",
    {
      "task": "instructions",
      "model": str(run.workdir),
      "questions": finetune.digest(*map(repr, questions)),
      "match": "exact, as text",
      "slots": lib.SLOTS,
      "sampler": dataclasses.asdict(sampler),
    },
  )

  marks = ledger.each(
    range(len(questions)),
    lambda part: lib.right(
      run,
      [questions[i] for i in part],
      sampler=sampler,
      use_ema=setting.use_ema,
      rows=options.at_once,
    ),
    at_once=options.at_once,
    unit="question",
  )
  rows = []
  for kind in kinds:
    own = [m for q, m in zip(questions, marks, strict=True) if q.kind == kind]
    share = sum(own) / len(own)
    rows.append({
      "model": name,
      "group": group,
      "kind": kind,
      "exact_match": share,
      "interval_95": wilson(share, len(own)),
      "questions": len(own),
    })
  return rows


def _text(result: Mapping[str, Any]) -> str:
  if "message" in result:
    return result["message"]
  lines = [
    "| model | group | kind | exact match | 95 % interval | questions |",
    "|---|---|---|---|---|---|",
  ]
  for row in result["rows"]:
    low, high = row["interval_95"]
    lines.append(
      f"| {row['model']} | {row['group']} | {row['kind']} "
      f"| {row['exact_match']:.3f} | {low:.3f} to {high:.3f} "
      f"| {row['questions']} |"
    )
  return "\n".join(lines) + "\n"


TASK = Task(
  summary="instructions before and after fine-tuning on conversations",
  run=_run,
  text=_text,
  options=Instructions,
  opens=False,
)

"""`--task=planning`: puzzles, arithmetic and code, marked by rules.

Sudoku and Countdown are made here or read from files and checked by their rules;
GSM8K is marked by its number; HumanEval and MBPP by running what was written,
contained. A working directory without a run gets one, trained on other puzzles of
the same kind.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent import futures
import dataclasses
import os
from typing import Any

from dllm_jax.core import check, paths
from dllm_jax.evaluation.benchmarks import (
  finetune,
  math_and_code,
  puzzles,
  recall,
  sandbox,
)
from dllm_jax.evaluation.tasks.registry import option, Setting, Task
from dllm_jax.run.run import Run
from dllm_jax.sampling import requests
from dllm_jax.sampling.presets import SamplerConfig

_EXAMS = ("gsm8k", "humaneval", "mbpp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planning:
  """What `--task=planning` is told.

  Attributes: as their help says.
  """

  problems: str = option(
    "sudoku4",
    f"puzzles to make ({', '.join(puzzles.KINDS)}), or a file of puzzles (.csv, "
    ".jsonl) or of problems (see --form)",
    path=True,
  )
  form: str = option(
    "puzzles", f"what the file holds: puzzles, {', '.join(_EXAMS)}"
  )
  count: int = option(100, "at most so many problems; 0 for all of a file")
  seed: int = option(0, "the seed of puzzles that are made, and of sampling")
  infill: bool = option(
    True, "Sudoku: clamp the given cells inside the answer as well"
  )
  new_tokens: int = option(
    0, "tokens of an answer; 0 for what is left of the training length"
  )
  examples: str = option(
    "", "GSM8K: the file that examples come from", path=True
  )
  shots: int = option(3, "examples before a question (gsm8k, mbpp)")
  strict: bool = option(True, "GSM8K: only a number after '#### ' counts")
  seconds: float = option(10.0, "time that a generated program has")
  memory_mb: int = option(1024, "memory that a generated program has, MiB")
  train_on: int = option(20000, "puzzles to train on, where there is no run")
  steps: int = option(0, "training steps; 0 for the recipe's")
  recipe: str = option(
    "planning", "the configuration of a model to train", path=True
  )
  objective: str = option("mdlm", "the objective of a model to train")
  at_once: int = option(100, "problems in a batch")

  def __post_init__(self):
    legal = ("puzzles", *_EXAMS)
    if self.form not in legal:
      raise ValueError(f"unknown --form {self.form!r}; legal: {legal}")
    if self.at_once < 1 or self.train_on < 1:
      raise ValueError("--at_once and --train_on must be at least 1")
    check.at_least(
      self, 0, "count", "new_tokens", "shots", "steps", prefix="--"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Asked:
  """A problem as a run is given it: text, and what is known of the answer."""

  name: str
  prompt: str
  slots: str = ""  # a known sign, or "?"; "" for an open answer
  problem: Any = None


def _run(setting: Setting, options: Planning) -> Mapping[str, Any]:
  limits = sandbox.Limits(seconds=options.seconds, memory_mb=options.memory_mb)
  asked = _problems(options)
  try:
    run = _model(setting, options, asked)
  except finetune.InterruptedTask as stop:
    return {"interrupted": True, "message": str(stop)}
  sampler = finetune.greedy(run, setting)
  code = any(isinstance(a.problem, math_and_code.Code) for a in asked)
  fields = {
    "task": "planning",
    "problems": options.problems,
    "form": options.form,
    "asked": finetune.digest(*(a.prompt + a.slots for a in asked)),
    "new_tokens": options.new_tokens,
    "sampler": dataclasses.asdict(sampler),
  }
  if code:
    fields |= {"limits": dataclasses.asdict(limits)}
    fields |= {"isolation": sandbox.isolation()}
  ledger = finetune.about(run, setting).ledger("planning", fields)
  values = ledger.each(
    range(len(asked)),
    lambda part: _answers(
      run, [asked[i] for i in part], sampler, setting, options, limits
    ),
    at_once=options.at_once,
    unit="problem",
  )
  right = [value["right"] for value in values]
  share = sum(right) / len(right)
  return {
    "interrupted": False,
    "accuracy": share,
    "standard_error": recall.standard_error(right),
    "interval_95": recall.wilson(share, len(right)),
    "problems": len(right),
    "reasons": dict(Counter(_kind(v["reason"]) for v in values)),
    "examples": [
      {"asked": a.prompt[-200:], **value}
      for a, value in list(zip(asked, values, strict=True))[:3]
    ],
    "protocol": ledger.protocol,
  }


def _kind(reason: str) -> str:
  """Returns the class of a failure: the exception without what it says."""
  return reason.split(":")[0]


def _problems(options: Planning) -> list[_Asked]:
  """Returns what is asked.

  Raises:
    FileNotFoundError: there is no such file, and no such puzzle.
  """
  most = options.count or None
  if options.problems in puzzles.KINDS:
    found = puzzles.generate(
      options.problems, options.count or 100, seed=options.seed
    )
    return [_puzzle(p, options.infill) for p in found]
  path = paths.place(options.problems)
  if not path.is_file():
    raise FileNotFoundError(
      f"no problems {options.problems!r}; give a file, or one of: "
      + ", ".join(puzzles.KINDS)
    )
  if options.form == "puzzles":
    return [_puzzle(p, options.infill) for p in puzzles.read(path)[:most]]
  if options.form == "gsm8k":
    examples = paths.place(options.examples) if options.examples else None
    found = math_and_code.gsm8k(
      path, strict=options.strict, examples=examples, shots=options.shots
    )
  elif options.form == "humaneval":
    found = math_and_code.humaneval(path)
  else:
    found = math_and_code.mbpp(path, shots=options.shots)
  return [_Asked(name=e.name, prompt=e.prompt, problem=e) for e in found[:most]]


def _puzzle(puzzle: puzzles.Puzzle, infill: bool) -> _Asked:
  slots = puzzle.template()
  if not infill:
    slots = "?" * len(slots)
  return _Asked(
    name=puzzle.question, prompt=puzzle.question, slots=slots, problem=puzzle
  )


def _model(setting: Setting, options: Planning, asked: Sequence[_Asked]) -> Run:
  """Returns the run in the working directory, or one trained on puzzles there."""
  if (setting.workdir / "config.json").exists():
    return Run.open(setting.workdir)
  if options.problems not in puzzles.KINDS:
    raise FileNotFoundError(
      f"no run in {setting.workdir}: only puzzles that are made "
      f"({', '.join(puzzles.KINDS)}) can be trained on as well; give a run"
    )
  tested = {a.name for a in asked}
  # Another seed, and nothing that is asked. There are only so many 4 x 4 grids
  # but many ways to empty one.
  found = [
    p
    for p in puzzles.generate(
      options.problems, options.train_on, seed=-1 - options.seed
    )
    if p.question not in tested
  ]
  lines = puzzles.lines(found)
  length = max(map(len, lines))
  length = -(-length // 4) * 4
  text = "".join(line.ljust(length, puzzles.END) for line in lines)
  lesson = finetune.lesson(
    setting.workdir / options.objective,
    recipe=options.recipe,
    objective=options.objective,
    text=finetune.kept(setting.workdir / "puzzles", "puzzles", text, ".txt"),
    tokenizer="char",
    length=length,
    steps=options.steps,
  )
  return finetune.teach([lesson], progress=setting.progress)[0]


def _answers(
  run: Run,
  asked: Sequence[_Asked],
  sampler: SamplerConfig,
  setting: Setting,
  options: Planning,
  limits: sandbox.Limits,
) -> list[dict[str, Any]]:
  """Returns what was written for each problem, and its mark."""
  prompts = [[int(i) for i in run.tokenizer.encode(a.prompt)] for a in asked]
  length = run.config.data.length
  if options.new_tokens:
    length = max(map(len, prompts)) + options.new_tokens
    length = requests.bucket(length)
  templates = []
  for a, prompt in zip(asked, prompts, strict=True):
    if a.slots:
      rest = [
        None if sign == "?" else int(run.tokenizer.encode(sign)[0])
        for sign in a.slots
      ]
      room = length - len(prompt) - len(rest)
      templates.append([*prompt, *rest, *[None] * room])
    else:
      templates.append(
        requests.continuation(
          prompt, length=length, new_tokens=options.new_tokens or None
        )
      )
  rows, _ = finetune.fill(
    run,
    templates,
    length=length,
    sampler=sampler,
    use_ema=setting.use_ema,
    rows=options.at_once,
  )
  written = [
    run.tokenizer.decode(row[len(prompt) :])
    for row, prompt in zip(rows, prompts, strict=True)
  ]
  with futures.ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
    return list(
      pool.map(lambda a, w: _marked(a.problem, w, limits), asked, written)
    )


def _marked(
  problem: Any, written: str, limits: sandbox.Limits
) -> dict[str, Any]:
  if isinstance(problem, math_and_code.Code):
    mark = problem.marked(written, limits)
  elif isinstance(problem, math_and_code.GSM8K):
    mark = problem.marked(written)
  else:
    right = puzzles.solved(problem, written)
    mark = math_and_code.Mark(
      right=right, reason="passed" if right else "wrong"
    )
  return {"right": mark.right, "reason": mark.reason, "written": written[:500]}


def _text(figures: Mapping[str, Any]) -> str:
  if "message" in figures:
    return figures["message"]
  low, high = figures["interval_95"]
  error = figures["standard_error"]
  reasons = ", ".join(f"{n} {r}" for r, n in figures["reasons"].items())
  return (
    f"{figures['accuracy']:.3f} of {figures['problems']} problems right "
    f"(standard error {0.0 if error is None else error:.3f}, 95 % interval "
    f"{low:.3f} to {high:.3f}): {reasons}"
  )


TASK = Task(
  summary="Sudoku, Countdown, GSM8K, HumanEval, MBPP: marked by rules or by "
  "running the code, contained",
  run=_run,
  text=_text,
  options=Planning,
  opens=False,
)

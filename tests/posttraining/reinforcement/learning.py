"""Reinforcement after fine-tuning on answers of which one in two is wrong.

    python -m tests.posttraining.reinforcement.learning FOLDER STEPS METHOD \
        SEED UPDATES RATE

A small network is fine-tuned on 4 x 4 Sudoku, half of whose grids follow the
rules but not the cells that were given; what it writes of its own is a mixture
of both. The verifier tells it which are right. Prints the figures of
docs/reinforcement.md.
"""

import dataclasses
import json
import pathlib
import sys
import time

import numpy as np

from dllm_jax import plots
from dllm_jax.config import config
from dllm_jax.evaluation.benchmarks import puzzles
from dllm_jax.posttraining.reinforcement import Reinforce, Reinforcement
from dllm_jax.posttraining.reinforcement.methods import (
  CoupledGRPO,
  DiffuGRPO,
  ESPO,
  SPG,
  TraceRL,
  WD1,
)
from dllm_jax.posttraining.reinforcement.rewards import registry
from dllm_jax.posttraining.reinforcement.rewards.pool import Rewards
from dllm_jax.run.run import Run

LENGTH = 36

METHODS = {
  "espo": ESPO(group=8, iterations=1, samples=2, beta=0.0),
  "coupled_grpo": CoupledGRPO(group=8, iterations=1, beta=0.0),
  "tracerl": TraceRL(group=8, shrink=2, keep_low=0.0, keep_high=1.0, beta=0.0),
  "diffu_grpo": DiffuGRPO(group=8, iterations=1, beta=0.0),
  "spg": SPG(group=8, iterations=1, block_length=16, prompt_rate=0.0),
  "wd1": WD1(group=8, iterations=1),
}


def resolved(folder, **fields):
  """Returns the configuration of the small network."""
  given = config.load("planning").to_dict()
  given["data"] |= {
    "path": str(folder / "grids.txt"), "tokenizer": "char", "length": LENGTH,
    "held_out": 0.0,
  }  # fmt: skip
  given["model"] |= {"width": 64, "layers": 3, "heads": 4, "unroll": 3}
  given["logging"] |= {"progress": False, "every_steps": 10}
  given["mesh"] = {"data": 1}
  for name, value in fields.items():
    section, field = name.split("__")
    given[section][field] = value
  return config.resolve(given)


def base(folder, steps):
  """Returns the network after some steps on other puzzles."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  text = "".join(
    _half_wrong(i, line).ljust(LENGTH, puzzles.END)
    for i, line in enumerate(
      puzzles.lines(puzzles.generate("sudoku4", 4000, seed=-1))
    )
  )
  path = folder / "grids.txt"
  if not path.exists():
    path.write_text(text)
  fields = {"training__steps": steps, "checkpoint__every_steps": 25}
  run = Run.create(resolved(folder, **fields), folder / f"base{steps}")
  run.train()
  return Run.open(folder / f"base{steps}", mesh={"data": 1})


def _half_wrong(number, line):
  """Returns every second line with another grid: each digit is the next one."""
  question, answer = line.split("=")
  if number % 2:
    answer = answer.translate(str.maketrans("1234", "2341"))
  return f"{question}={answer}"


def begun(source, folder, method, seed, *, steps=100, rate=1e-3, **fields):
  """Returns a run that has yet to learn."""
  told = Reinforce(
    problems="sudoku4",
    count=2000,
    held_out=200,
    rewards="sudoku=1,sudoku_cells=0.5",
    prompts=16,
    new_tokens=17,
    seed=seed,
    processes=1,
  )
  given = {
    "training__steps": steps,
    "training__batch_size": 128,
    "training__seed": seed,
    "checkpoint__every_steps": 25,
    "evaluation__every_steps": max(steps // 5, 1),
    "evaluation__batch_size": 200,
    "evaluation__batches": 1,
    "sampler__preset": "llada",
    "sampler__temperature": 1.0,
    "sampler__steps": 6,
    "optimizer__name": "adamw",
    "optimizer__learning_rate": rate,
    "optimizer__schedule": "constant",
    "optimizer__warmup_steps": 0,
    "optimizer__weight_decay": 0.0,
  } | fields
  return Reinforcement(
    source, folder, resolved(source.workdir.parent, **given), told, method
  )


def accuracy(learning):
  """Returns the share of held-out puzzles that a run answers, without chance."""
  terms = registry.parse("sudoku=1")
  with Rewards(terms, seconds=10.0, processes=1) as rewards:
    return learning._evaluate(rewards)(learning.run.state)["eval_sudoku"]


def curves(folder):
  """Returns the logged lines of a run."""
  path = pathlib.Path(folder) / "metrics.jsonl"
  return list(map(json.loads, path.read_text().splitlines()))


def picture(folder, names):
  """Returns an SVG of the accuracy while learning, means over seeds.

  Before the first update it is 0, as `main` prints.

  Args:
    folder: of the runs.
    names: what runs are called in the picture, and the pattern of their folders.
  """
  found = {}
  for name, pattern in names.items():
    runs = [
      {0: 0.0}
      | {x["step"]: x["eval_sudoku"] for x in curves(run) if "eval_sudoku" in x}
      for run in sorted(pathlib.Path(folder).glob(pattern))
    ]
    steps = sorted(set.intersection(*map(set, runs)))
    values = np.array([[run[step] for step in steps] for run in runs])
    error = values.std(axis=0, ddof=1) / len(runs) ** 0.5
    found[name] = list(zip(steps, values.mean(axis=0), error, strict=True))
  return plots.line_plot(
    found, x_label="updates", y_label="held-out puzzles solved"
  )


def main(folder, steps, name, seed, updates, rate):
  source = base(folder, int(steps))
  output = pathlib.Path(folder) / f"{name}-{seed}-{steps}-{updates}-{rate}"
  method = METHODS[name]
  learning = begun(
    source, output, method, int(seed), steps=int(updates), rate=float(rate)
  )
  before, start = accuracy(learning), time.perf_counter()
  found = learning.train() | {
    "before": before, "seconds": time.perf_counter() - start
  }  # fmt: skip
  for line in curves(output):
    if "eval_reward" in line or "reward" in line:
      kept = ("step", "reward", "reward_sudoku", "eval_sudoku", "entropy",
              "skipped_groups", "seconds_sampling", "seconds_host")  # fmt: skip
      print({k: round(line[k], 4) for k in kept if k in line})
  print(json.dumps({"method": dataclasses.asdict(method), **found}))


if __name__ == "__main__":
  main(*sys.argv[1:])

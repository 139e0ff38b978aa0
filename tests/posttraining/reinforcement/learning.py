"""A small network that fills 4 x 4 Sudoku grids, some of them right, learns more.

    python -m tests.posttraining.reinforcement.learning FOLDER METHOD SEED ...

prints the figures of docs/reinforcement.md.
"""

import dataclasses
import json
import pathlib
import sys
import time

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
    line.ljust(LENGTH, puzzles.END)
    for line in puzzles.lines(puzzles.generate("sudoku4", 4000, seed=-1))
  )
  path = folder / "grids.txt"
  if not path.exists():
    path.write_text(text)
  fields = {"training__steps": steps, "checkpoint__every_steps": 25}
  run = Run.create(resolved(folder, **fields), folder / f"base{steps}")
  run.train()
  return Run.open(folder / f"base{steps}", mesh={"data": 1})


def learn(source, folder, method, seed, *, steps=100, rate=1e-3, **fields):
  """Returns the curve of a run: (step, accuracy, seconds)."""
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
  learning = Reinforcement(
    source, folder, resolved(source.workdir.parent, **given), told, method
  )
  begun = time.perf_counter()
  summary = learning.train()
  return summary | {"seconds": time.perf_counter() - begun}


def curves(folder):
  """Returns the logged lines of a run."""
  path = pathlib.Path(folder) / "metrics.jsonl"
  return list(map(json.loads, path.read_text().splitlines()))


def main(folder, steps, name, seed, updates, rate):
  source = base(folder, int(steps))
  output = pathlib.Path(folder) / f"{name}-{seed}-{steps}-{updates}-{rate}"
  method = METHODS[name]
  found = learn(
    source, output, method, int(seed), steps=int(updates), rate=float(rate)
  )
  for line in curves(output):
    if "eval_reward" in line or "reward" in line:
      kept = ("step", "reward", "reward_sudoku", "eval_sudoku", "entropy",
              "skipped_groups", "seconds_sampling", "seconds_host")  # fmt: skip
      print({k: round(line[k], 4) for k in kept if k in line})
  print(json.dumps({"method": dataclasses.asdict(method), **found}))


if __name__ == "__main__":
  main(*sys.argv[1:])

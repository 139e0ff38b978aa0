"""Rollouts with the dual cache beside rollouts without: one network, in turns.

    python -m tests.speed.rollouts FOLDER

A network that has learned 9 x 9 Sudoku for some minutes writes grids as
`dllm reinforce` has it write them, 64 at once on canvases of 168 slots, in blocks
of 12, a cell a call, at temperature 1. Prints JSON: the median seconds of a round,
the median over the rounds of the ratio of the two, and what the grids earned
(`sudoku_cells`), with its standard error over prompts. FOLDER keeps the network.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics

import numpy as np

from dllm_jax.config import config
from dllm_jax.evaluation.benchmarks import puzzles
from dllm_jax.posttraining.reinforcement import problems, rollouts
from dllm_jax.posttraining.reinforcement.rewards import verifiers
from dllm_jax.posttraining.reinforcement.sampled import Sampling
from dllm_jax.run.run import Run

CELLS = 81
LENGTH = 2 * CELLS + 2  # grid, "=", grid, end
CANVAS, BLOCK = 168, 12


def learned(folder: pathlib.Path, steps: int) -> Run:
  """Returns a run that has learned for some steps."""
  folder.mkdir(parents=True, exist_ok=True)
  text = folder / "grids.txt"
  if not text.exists():
    made = puzzles.generate("sudoku9", 2000, seed=-1)
    text.write_text("".join(puzzles.lines(made)))
  given = config.load("planning").to_dict()
  given["data"] |= {"path": str(text), "length": LENGTH, "held_out": 0.0}
  given["training"] |= {"steps": steps, "batch_size": 32}
  given["mesh"] = {"data": 1}
  run = Run.create(config.resolve(given), folder / "run")
  run.train()
  return Run.open(folder / "run", mesh={"data": 1})


def main() -> None:
  """Measures and prints."""
  flags = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument("folder", type=pathlib.Path)
  flags.add_argument("--steps", type=int, default=300)
  flags.add_argument("--rounds", type=int, default=5)
  flags.add_argument("--rows", type=int, default=64)
  args = flags.parse_args()
  run = learned(args.folder, args.steps)
  asked, _ = problems.load(
    "sudoku9",
    run.tokenizer,
    count=args.rows * args.rounds,
    held_out=1,
    seed=1,
  )
  sampler = dataclasses.replace(
    run.config.sampler,
    preset="llada",
    block_length=BLOCK,
    steps=BLOCK,
    temperature=1.0,
  )
  ways = {
    cache: Sampling(
      run=run,
      length=CANVAS,
      new_tokens=CELLS + 1,
      rows=args.rows,
      sampler=dataclasses.replace(sampler, cache=cache),
      seed=0,
    )
    for cache in ("none", "dual")
  }

  def once(cache, number):
    here = asked[number * args.rows :][: args.rows]
    (part,) = ways[cache].parts(run.state, here, number * args.rows)
    earned = [
      verifiers.sudoku_cells(
        p.prompt,
        run.tokenizer.decode(rollouts.answer(tokens, given, CELLS + 1, ())),
        p.row,
      )
      for p, tokens, given in zip(here, part.tokens, part.given, strict=True)
    ]
    return part.seconds, earned, int(part.calls.max())

  for cache in ways:
    once(cache, 0)
  rounds = [
    {cache: once(cache, number) for cache in ways}
    for number in range(args.rounds)
  ]
  ratios = [each["none"][0] / each["dual"][0] for each in rounds]
  rewards = {c: np.concatenate([each[c][1] for each in rounds]) for c in ways}
  spread = rewards["dual"] - rewards["none"]
  error = lambda x: float(x.std(ddof=1) / len(x) ** 0.5)
  print(
    json.dumps({
      "calls": {c: rounds[0][c][2] for c in ways},
      "seconds": {
        c: statistics.median(each[c][0] for each in rounds) for c in ways
      },
      "ratio": statistics.median(ratios),
      "ratios": ratios,
      "reward": {c: [float(x.mean()), error(x)] for c, x in rewards.items()},
      "difference": [float(spread.mean()), error(spread)],
    })
  )


if __name__ == "__main__":
  main()

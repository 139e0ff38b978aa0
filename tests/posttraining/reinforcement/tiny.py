"""A tiny network that fills Sudoku grids, untrained, as a run."""

import jax

from dllm_jax.core.types import Process
from dllm_jax.evaluation.benchmarks import puzzles
from dllm_jax.posttraining.reinforcement import Reinforce, Reinforcement
from dllm_jax.posttraining.reinforcement.methods import ESPO
from dllm_jax.run.run import Run
from dllm_jax.training.checkpoint import Checkpoints
from tests import runs

LENGTH = 36


def fields(text, **more):
  """Returns the configuration of a tiny run as fields."""
  return {
    "data__path": str(text),
    "data__tokenizer": "char",
    "data__length": LENGTH,
    "data__held_out": 0.0,
    "training__batch_size": 4,
    "training__ema_decay": 0.0,
    "training__steps": 6,
    "checkpoint__every_steps": 3,
    "evaluation__batch_size": 4,
    "evaluation__batches": 1,
    "sampler__preset": "llada",
    "sampler__temperature": 1.0,
    "sampler__steps": 2,
  } | more


def source(folder):
  """Returns a run with a checkpoint of fresh parameters."""
  text = folder / "grids.txt"
  text.write_text("".join(puzzles.lines(puzzles.generate("sudoku4", 40))))
  run = runs.run(folder / "source", **fields(text))
  run.start()
  with Checkpoints(run.workdir) as checkpoints:
    checkpoints.save_imported(run.state.params["model"], Process())
  return opened(folder / "source"), text


def opened(workdir, mesh=None, devices=1):
  """Returns a run on some of the simulated devices."""
  return Run.open(
    workdir, mesh=mesh or {"data": 1}, devices=jax.devices()[:devices]
  )


def told(**more):
  """Returns what the loop is told."""
  return Reinforce(**{
    "problems": "sudoku4",
    "count": 8,
    "held_out": 4,
    "rewards": "sudoku_cells=1",
    "prompts": 2,
    "processes": 1,
    **more,
  })


def reinforcement(run, text, output, *, method=None, loop=None, **more):
  """Returns a reinforcement of the run: 2 updates a pass, 4 an iteration."""
  method = method or ESPO(group=4, iterations=2)
  resolved = runs.tiny(**fields(text, **more))
  return Reinforcement(run, output, resolved, loop or told(), method)

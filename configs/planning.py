"""A small transformer that learns puzzles, one a line, for the planning task.

dllm evaluate --task=planning --workdir=runs/planning --problems=sudoku4

makes the puzzles, trains on them and is asked others.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the defaults."""
  return ConfigDict({
    "data": {"path": "shakespeare", "tokenizer": "char", "length": 36},
    "objective": {"name": "mdlm"},
    "model": {
      "width": 128,
      "layers": 4,
      "heads": 4,
      "qk_norm": True,
      "unroll": 4,
    },
    "optimizer": {
      "name": "muon",
      "learning_rate": 1e-2,
      "schedule": "wsd",
      "warmup_steps": 50,
    },
    "training": {"steps": 2000, "batch_size": 64},
    "checkpoint": {"every_steps": 500, "keep": 1},
    "logging": {"every_steps": 100, "tensorboard": False},
  })

"""A small transformer that learns facts word by word, for the reversal curse.

dllm evaluate --task=reversal --workdir=runs/reversal

trains two of them, which differ in the objective alone; the text is the task's.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the defaults."""
  return ConfigDict({
    "data": {"path": "shakespeare", "tokenizer": "char", "length": 16},
    "objective": {"name": "mdlm"},
    "model": {
      "width": 96,
      "layers": 2,
      "heads": 4,
      "qk_norm": True,
      "unroll": 2,
    },
    # Muon learns pairs that occur rarely sooner than Adam.
    "optimizer": {
      "name": "muon",
      "learning_rate": 1e-2,
      "schedule": "wsd",
      "warmup_steps": 50,
    },
    "training": {"steps": 2000, "batch_size": 32},
    "checkpoint": {"every_steps": 500, "keep": 1},
    "logging": {"every_steps": 100, "tensorboard": False},
  })

"""MDLM on tiny Shakespeare at a size that trains in seconds, to try things.

dllm train --config=configs/smoke.py --workdir=runs/smoke
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the defaults."""
  return ConfigDict({
    "data": {"path": "shakespeare", "tokenizer": "char", "length": 64},
    "objective": {"name": "mdlm"},
    "model": {"width": 64, "layers": 2, "heads": 4},
    "optimizer": {"learning_rate": 3e-3, "warmup_steps": 5},
    "training": {"steps": 30, "batch_size": 16},
    "checkpoint": {"every_steps": 10},
    "evaluation": {"batch_size": 16, "batches": 8, "passes": 2},
  })

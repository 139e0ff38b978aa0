"""MDLM on tiny Shakespeare, characters: the demo, minutes on two CPU cores.

dllm train --config=configs/shakespeare.py --workdir=runs/shakespeare
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the defaults."""
  return ConfigDict({
    "data": {"path": "shakespeare", "tokenizer": "char", "length": 128},
    # A schedule without a floor makes the figure a strict bound.
    "objective": {"name": "mdlm", "schedule": {"name": "linear"}},
    "model": {
      "width": 128,
      "layers": 4,
      "heads": 4,
      # Bounded attention logits bear twice the learning rate.
      "qk_norm": True,
      "unroll": 4,  # on a CPU faster than a loop over layers
    },
    "optimizer": {
      "learning_rate": 6e-3,
      "warmup_steps": 50,
      "weight_decay": 0.01,
    },
    "training": {"steps": 1000, "batch_size": 16, "ema_decay": 0.99},
    "checkpoint": {"every_steps": 250},
    "evaluation": {
      "every_steps": 500,
      "batch_size": 32,
      "batches": 8,  # while training; `dllm evaluate` reads all of it
      "passes": 4,
      "sample_every": 500,
    },
  })

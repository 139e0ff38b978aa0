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
      # Bounded attention logits bear high learning rates.
      "qk_norm": True,
      "embedding_std": 1.0,  # seen beside what the first branches add
      "unroll": 4,  # on a CPU faster than a loop over layers
    },
    "optimizer": {
      "name": "muon",  # leaves the plateau of the beginning early
      "learning_rate": 0.015,
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

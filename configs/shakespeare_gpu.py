"""MDLM on tiny Shakespeare, 10.7M parameters, for one accelerator.

The size of nanoGPT's character model (6 layers, width 384, length 256).

    dllm train --config=configs/shakespeare_gpu.py --workdir=runs/shakespeare
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the defaults."""
  return ConfigDict({
    "data": {"path": "shakespeare", "tokenizer": "char", "length": 256},
    "objective": {"name": "mdlm", "schedule": {"name": "linear"}},
    "model": {
      "width": 384,
      "layers": 6,
      "heads": 6,
      "dropout": 0.1,
      "dtype": "bfloat16",
    },
    "optimizer": {
      "learning_rate": 1e-3,
      "warmup_steps": 100,
      "weight_decay": 0.1,
    },
    "training": {
      "steps": 5000,
      "batch_size": 256,
      "ema_decay": 0.999,
    },
    "checkpoint": {"every_steps": 500},
    "evaluation": {
      "every_steps": 500,
      "batch_size": 64,
      "passes": 4,
      "sample_every": 1000,
    },
  })

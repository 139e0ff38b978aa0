"""DiffusionGemma's canvases of 16 characters, beside shakespeare.py.

The network is its own: windowed layers and a full one, experts beside a
perceptron.

dllm train --config=configs/shakespeare_diffusion_gemma.py \
        --workdir=runs/gemma
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the defaults."""
  return ConfigDict({
    "data": {"path": "shakespeare", "tokenizer": "char", "length": 128},
    "objective": {"name": "diffusion_gemma", "canvas": 16},
    "model": {
      "name": "gemma",
      "width": 128,
      "layers": 4,
      "heads": 4,
      "window": 64,
      "experts": 4,
      "experts_per_token": 2,
      "expert_dim": 128,
      "balance_weight": 0.01,
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
    "sampler": {"preset": "diffusion_gemma"},
  })

"""A small network that answers instructions, and is then taught others.

    dllm evaluate --task=instructions --workdir=runs/instructions

teaches one from its first step, fine-tunes it wholly and by adapters, and asks all
three; the conversations and their tokenizer are the task's.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the defaults."""
  return ConfigDict({
    "data": {"path": "shakespeare", "tokenizer": "char", "length": 32},
    # LLaDA's fine-tuning: answers with their fill, each by its length.
    "objective": {
      "name": "llada",
      "normalisation": "sequence",
      "random_length": 0.0,
    },
    "model": {
      "width": 128,
      "layers": 4,
      "heads": 4,
      "qk_norm": True,
      "embedding_std": 1.0,
      "unroll": 4,
    },
    "optimizer": {
      "name": "muon",
      "learning_rate": 0.015,
      "warmup_steps": 50,
    },
    "training": {"steps": 800, "batch_size": 64},
    "checkpoint": {"every_steps": 200, "keep": 1},
    "evaluation": {"every_steps": 400, "batches": 4, "sample_every": 400},
    "logging": {"every_steps": 50, "tensorboard": False},
    "sampler": {"preset": "llada", "temperature": 0.0},
  })

"""Diffusion-LM on restaurant descriptions (E2E), the text of its controls.

Rows of 64 words, 16 features, T = 2000 steps, learning rate 1e-4, 200k steps of 64
rows (arXiv:2205.14217). As a language model it is weak: perplexity at most 118.62
on LM1B (arXiv:2406.07524, table 1); what it offers is control by gradients.

    dllm train --config=configs/e2e_diffusion_lm.py --workdir=runs/e2e
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the defaults."""
  return ConfigDict({
    "data": {
      "path": "e2e/*.txt",
      "tokenizer": "e2e/tokenizer.json",  # of whole words
      "length": 64,
      "packing": "packed",
      "document_separator": "\n",
    },
    "objective": {"name": "diffusion_lm", "features": 16, "steps": 2000},
    "model": {
      "width": 768,
      "layers": 12,
      "heads": 12,
      "dropout": 0.1,
    },
    "optimizer": {"learning_rate": 1e-4, "warmup_steps": 0},
    "training": {
      "steps": 200_000,
      "batch_size": 64,
      "ema_decay": 0.9999,
    },
    "checkpoint": {"every_steps": 5000},
    "logging": {"every_steps": 100},
    "evaluation": {"every_steps": 10_000, "batches": 20},
  })

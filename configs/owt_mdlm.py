"""MDLM on OpenWebText, 110M parameters: published perplexity at most 23.21.

GPT-2 tokens, length 1024, batch 512, 1M steps (262B tokens), learning rate 3e-4
after 2,500 warm-up steps, dropout 0.1, EMA 0.9999, clipping 1.0 (arXiv:2406.07524,
table 2, which has 17.54 for the autoregressive twin and at most 24.10 for SEDD).
Published on 8 A100s for about a week.

    dllm prepare --input='owt/*.parquet' --tokenizer=gpt2/tokenizer.json \
        --output=owt_tokens --length=1024 --held_out=0.0125
    dllm train --config=configs/owt_mdlm.py --workdir=runs/owt \
        --config.data.path=owt_tokens
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the defaults."""
  return ConfigDict({
    "data": {"path": "owt_tokens", "length": 1024},
    "objective": {
      "name": "mdlm",
      "schedule": {"name": "loglinear", "floor": 1e-3},
    },
    "model": {
      "name": "dit",
      "width": 768,
      "layers": 12,
      "heads": 12,
      "dropout": 0.1,
      "dtype": "bfloat16",
      "remat": "dots",
    },
    "optimizer": {
      "learning_rate": 3e-4,
      "schedule": "constant",
      "warmup_steps": 2500,
      "b2": 0.999,
      "clip_norm": 1.0,
    },
    "training": {
      "steps": 1_000_000,
      "batch_size": 512,
      "ema_decay": 0.9999,
    },
    "checkpoint": {"every_steps": 5000},
    "logging": {"every_steps": 100},
    "evaluation": {
      "every_steps": 10_000,
      "batch_size": 512,
      "batches": 10,
      "passes": 2,
    },
  })

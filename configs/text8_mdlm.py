"""MDLM on text8, characters: published bound 1.40 bits per character.

Length 256, batch 512, 1M steps, a 12-layer network of width 768 (arXiv:2406.07524;
table 1 of arXiv:2502.09564 gives at most 1.40; MD4 reports 1.37 and an
autoregressive transformer 1.23 on the same split: the first 90M characters train,
the next 5M validate, the last 5M test). Published on 8 GPUs for days.

    dllm prepare --input=text8 --tokenizer=char --output=text8_tokens \
        --length=256 --held_out=0.1
    dllm train --config=configs/text8_mdlm.py --workdir=runs/text8 \
        --config.data.path=text8_tokens
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the defaults."""
  return ConfigDict({
    "data": {"path": "text8_tokens", "length": 256},
    "objective": {
      "name": "mdlm",
      "schedule": {"name": "loglinear", "floor": 1e-3},
    },
    "model": {
      "name": "dit",
      "width": 768,
      "layers": 12,
      "heads": 12,
      "dropout": 0.05,
      "dtype": "bfloat16",
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
      "batches": 20,
      "passes": 2,
    },
  })

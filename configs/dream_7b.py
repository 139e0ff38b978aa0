"""Dream 7B, from autoregressive weights: published MMLU 69.5, GSM8K 77.2.

580B tokens from Qwen2.5-7B's weights, whose shape this is (arXiv:2508.15487).

    dllm train --config=configs/dream_7b.py:v5p:4x4x8 --workdir=runs/dream \
        --config.data.path=tokens
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the defaults."""
  return ConfigDict({
    "vocab_size": 152_064,
    "data": {"path": "tokens", "length": 2048},
    "objective": {"name": "dream", "token_weights": "cart"},
    "model": {
      "width": 3584,
      "layers": 28,
      "heads": 28,
      "kv_heads": 4,
      "mlp_dim": 18_944,
      "qkv_bias": True,
      "rope_theta": 1_000_000.0,
      "dtype": "bfloat16",
      "remat": "full",
    },
    "optimizer": {
      "learning_rate": 1e-5,
      "warmup_steps": 2000,
      "b2": 0.95,
      "weight_decay": 0.1,
    },
    "training": {"steps": 280_000, "batch_size": 1024},
    "checkpoint": {"every_steps": 2000},
    "machines": {
      "v5p:4x4x8": {
        "mesh": {"data": 1, "fsdp": 128},
        "model": {"attention": "splash", "remat": "dots"},
        "training": {"microbatches": 1},
      },
      "v6e:16x16": {
        "mesh": {"data": 1, "fsdp": 256},
        "model": {"attention": "splash", "remat": "dots"},
        "training": {"microbatches": 2},
      },
      "h200:1x8": {
        "mesh": {"data": 1, "fsdp": 8},
        "model": {"attention": "cudnn", "remat": "dots"},
        "training": {"microbatches": 16},
      },
      "h200:8x8": {
        "mesh": {"data": 1, "fsdp": 64},
        "model": {"attention": "cudnn", "remat": "dots"},
        "training": {"microbatches": 2},
      },
    },
  })

"""LLaDA 1B, the smaller network of the scaling study: 1.49B parameters.

22 layers of width 2048, 32 heads over 4 of keys and values, data and recipe of
llada_8b.py (arXiv:2502.09992, table 5). Prepare data with the published tokenizer,
whose mask has id 126336.

    dllm train --config=configs/llada_1b.py:h200:1x8 --workdir=runs/llada_1b \
        --config.data.path=tokens
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "llada_8b",
    "model": {
      "width": 2048,
      "layers": 22,
      "heads": 32,
      "kv_heads": 4,
      "mlp_dim": 5634,
    },
    "training": {"steps": 100_000, "batch_size": 1024},
    "optimizer": {"decay_steps": 20_000},
    "machines": {
      "v5p:4x4x8": {
        "mesh": {"data": 1, "fsdp": 128},
        "model": {"attention": "splash", "remat": "dots"},
        "training": {"microbatches": 1},
      },
      "v6e:16x16": {
        "mesh": {"data": 1, "fsdp": 256},
        "model": {"attention": "splash", "remat": "dots"},
        "training": {"microbatches": 1},
      },
      "h200:1x8": {
        "mesh": {"data": 1, "fsdp": 8},
        "model": {"attention": "cudnn", "remat": "dots"},
        "training": {"microbatches": 8},
      },
      "h200:8x8": {
        "mesh": {"data": 1, "fsdp": 64},
        "model": {"attention": "cudnn", "remat": "dots"},
        "training": {"microbatches": 1},
      },
    },
  })

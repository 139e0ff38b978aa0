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
    "training": {"steps": 100_000},
    "optimizer": {"decay_steps": 20_000},
  })

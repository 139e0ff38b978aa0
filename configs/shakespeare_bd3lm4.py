"""BD3-LM with blocks of 4 tokens on tiny Shakespeare, beside shakespeare.py.

dllm train --config=configs/shakespeare_bd3lm4.py \
        --workdir=runs/bd3lm4
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "shakespeare",
    "objective": {"name": "bd3lm", "block_size": 4},
  })

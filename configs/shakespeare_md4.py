"""MD4 on tiny Shakespeare, beside shakespeare.py.

dllm train --config=configs/shakespeare_md4.py \
        --workdir=runs/md4
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "shakespeare",
    "objective": {"name": "md4"},
  })

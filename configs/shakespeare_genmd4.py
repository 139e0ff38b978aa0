"""GenMD4, learned schedules, on tiny Shakespeare, beside shakespeare.py.

dllm train --config=configs/shakespeare_genmd4.py \
        --workdir=runs/genmd4
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "shakespeare",
    "objective": {"name": "genmd4"},
  })

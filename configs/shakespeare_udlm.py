"""UDLM, uniform noise, on tiny Shakespeare, beside shakespeare.py.

dllm train --config=configs/shakespeare_udlm.py \
        --workdir=runs/udlm
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "shakespeare",
    "objective": {"name": "udlm"},
  })

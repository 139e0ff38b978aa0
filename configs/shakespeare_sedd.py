"""SEDD with the absorbing graph on tiny Shakespeare, beside shakespeare.py.

dllm train --config=configs/shakespeare_sedd.py \
        --workdir=runs/sedd
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "shakespeare",
    "objective": {"name": "sedd", "graph": "absorbing"},
  })

"""SEDD with the uniform graph on tiny Shakespeare, beside shakespeare.py.

dllm train --config=configs/shakespeare_sedd_uniform.py \
        --workdir=runs/sedd_uniform
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "shakespeare",
    "objective": {
      "name": "sedd",
      "graph": "uniform",
      "scale_by_sigma": False,
    },
  })

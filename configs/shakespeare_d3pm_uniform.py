"""D3PM with uniform transitions on tiny Shakespeare, beside shakespeare.py.

Without the cross-entropy term: it teaches p(x0 | z) with what z_i itself says of
x0_i, which the bound's own formula adds again, and costs 2 bits per character
here. (With masks z_i says nothing until it is x0_i.)

    dllm train --config=configs/shakespeare_d3pm_uniform.py \
        --workdir=runs/d3pm_uniform
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "shakespeare",
    "objective": {
      "name": "d3pm",
      "transition": "uniform",
      "cross_entropy": 0.0,
    },
  })

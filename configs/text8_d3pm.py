"""D3PM on text8, characters: published bound 1.61 bits (uniform), 1.45 (absorbing).

T = 1000 steps, mutual-information schedule (arXiv:2107.03006). For the absorbing
process set --config.objective.transition.name=absorbing and
--config.objective.cross_entropy=0.01, its lambda; shakespeare_d3pm_uniform.py says
why uniform noise has none.

The recipe of text8_mdlm.py, data prepared as it says.

    dllm train --config=configs/text8_d3pm.py --workdir=runs/text8_d3pm \
        --config.data.path=text8_tokens
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "text8_mdlm",
    "objective": {
      "name": "d3pm",
      "transition": "uniform",
      "steps": 1000,
      "cross_entropy": 0.0,
    },
  })

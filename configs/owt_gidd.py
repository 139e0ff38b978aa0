"""GIDD on OpenWebText: published perplexity about 23.36 without uniform noise.

arXiv:2503.04482 states 24.37 for its own MDLM with unweighted loss, 23.36 weighted.
Uniform noise, here 0.1, costs likelihood and lets a sampler correct itself.

The recipe of owt_mdlm.py, data prepared as it says.

    dllm train --config=configs/owt_gidd.py --workdir=runs/owt_gidd \
        --config.data.path=owt_tokens
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "owt_mdlm",
    "objective": {
      "name": "gidd",
      "noise": {"name": "bump", "uniform": 0.1},
      "weight_clip": 2.0,
    },
  })

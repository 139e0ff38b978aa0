"""SEDD on OpenWebText, 110M parameters: published perplexity at most 24.10.

The absorbing graph, as MDLM retrained it (arXiv:2406.07524, table 2).

The recipe of owt_mdlm.py, data prepared as it says.

    dllm train --config=configs/owt_sedd.py --workdir=runs/owt_sedd \
        --config.data.path=owt_tokens
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "owt_mdlm",
    "objective": {
      "name": "sedd",
      "graph": "absorbing",
      "schedule": {"name": "loglinear", "floor": 1e-3},
    },
  })

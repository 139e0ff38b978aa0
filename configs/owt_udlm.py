"""Uniform-state diffusion on OpenWebText: published perplexity at most 25.2 (Duo).

UDLM's bound in Duo's form (arXiv:2412.10193, arXiv:2506.10892). Duo's figure is with
a curriculum of soft inputs, which is not part of this recipe: expect a little more.

The recipe of owt_mdlm.py, data prepared as it says.

    dllm train --config=configs/owt_udlm.py --workdir=runs/owt_udlm \
        --config.data.path=owt_tokens
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "owt_mdlm",
    "objective": {"name": "udlm", "form": "rao_blackwell"},
  })

"""GenMD4 on text8, characters: published bound 1.34 bits per character.

A learned schedule for each token (arXiv:2406.04329, table 2).

The recipe of text8_mdlm.py, data prepared as it says.

    dllm train --config=configs/text8_genmd4.py --workdir=runs/text8_genmd4 \
        --config.data.path=text8_tokens
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "text8_mdlm",
    "objective": {"name": "genmd4"},
  })

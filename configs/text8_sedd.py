"""SEDD on text8, characters: published bound 1.39 bits per character.

The absorbing graph (arXiv:2310.16834; table 2 of arXiv:2406.04329).

The recipe of text8_mdlm.py, data prepared as it says.

    dllm train --config=configs/text8_sedd.py --workdir=runs/text8_sedd \
        --config.data.path=text8_tokens
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "text8_mdlm",
    "objective": {"name": "sedd", "graph": "absorbing"},
  })

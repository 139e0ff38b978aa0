"""MD4 on text8, characters: published bound 1.37 bits per character.

Continuous time, linear schedule clipped at 1e-4 (arXiv:2406.04329, table 2). The
published network is its own; this is the DiT of text8_mdlm.py.

The recipe of text8_mdlm.py, data prepared as it says.

    dllm train --config=configs/text8_md4.py --workdir=runs/text8_md4 \
        --config.data.path=text8_tokens
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "text8_mdlm",
    "objective": {"name": "md4"},
  })

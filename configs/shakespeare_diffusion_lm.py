"""Diffusion-LM, embeddings in place of tokens, beside shakespeare.py.

dllm train --config=configs/shakespeare_diffusion_lm.py \
        --workdir=runs/diffusion_lm
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "shakespeare",
    "objective": {"name": "diffusion_lm"},
  })

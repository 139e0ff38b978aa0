"""D3PM with absorbing transitions on tiny Shakespeare, beside shakespeare.py.

dllm train --config=configs/shakespeare_d3pm_absorbing.py \
        --workdir=runs/d3pm_absorbing
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "shakespeare",
    "objective": {"name": "d3pm", "transition": "absorbing"},
  })

"""An autoregressive transformer on tiny Shakespeare, beside shakespeare.py.

Its figure is exact; all others are bounds.

    dllm train --config=configs/shakespeare_autoregressive.py \
        --workdir=runs/autoregressive
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "shakespeare",
    "objective": {"name": "autoregressive"},
  })

"""Dream on tiny Shakespeare, beside shakespeare.py.

From random weights; the published model starts from an autoregressive one.

    dllm train --config=configs/shakespeare_dream.py \
        --workdir=runs/dream
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "shakespeare",
    "objective": {"name": "dream"},
  })

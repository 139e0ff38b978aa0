"""MMaDA's text alone, on tiny Shakespeare, beside shakespeare.py.

Without pictures it is LLaDA's loss by the row. digits_mmada.py has both.

dllm train --config=configs/shakespeare_mmada.py \
        --workdir=runs/mmada
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "shakespeare",
    "objective": {"name": "mmada", "lm": 1.0},
    "sampler": {"preset": "llada"},
  })

"""MD4 on tiny Shakespeare: shakespeare.py with MD4's times.

The network is not told the time, as MDLM's is not: given the masks it adds
nothing to a masked process, and at this size it only slows the start.

dllm train --config=configs/shakespeare_md4.py --workdir=runs/md4
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "shakespeare",
    "objective": {"name": "md4", "time_conditioning": False},
  })

"""Rewards by name, and processes that compute them.

`verifiers` are the functions, `parse` reads "name=weight, ...", `Rewards` asks.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "pool": ["Rewards"],
    "registry": ["parse"],
  },
)

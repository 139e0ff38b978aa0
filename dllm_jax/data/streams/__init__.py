"""Rows that are made as they are asked for: text packed on the fly, mixtures.

Both are dealt to virtual shards, so that a batch does not depend on how many
processes there are; `interleaved` makes batches of either.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "mixture": ["Mixture"],
    "stream": ["interleaved", "Stream"],
  },
)

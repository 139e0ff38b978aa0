"""IsoFLOP curves: what a budget of FLOPs buys, and how much one objective needs.

`grid` says which runs there are and what they cost, `runs` trains them, `fit` has
the laws, `report` writes what was found.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "fit": ["Law", "law", "multiplier", "Point"],
    "grid": ["Cell", "cells", "estimate"],
    "report": ["write"],
    "runs": ["missing", "train"],
  },
)

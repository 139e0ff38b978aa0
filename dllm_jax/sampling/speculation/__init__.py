"""Loops of rows at their own pointers: drafts that are tested, sliding windows."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={"rounds": ["speculate"], "sliding": ["slide"]},
)

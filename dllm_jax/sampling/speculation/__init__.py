"""Rows at their own pointers: tested drafts, sliding windows, parts of blocks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={"rounds": ["speculate"], "sliding": ["slide"]},
)

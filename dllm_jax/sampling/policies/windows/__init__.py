"""Policies that work inside a window: in parts of it, or editing its length."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "indel": ["InDel"],
    "parts": ["Sliding", "SubBlocks"],
    "resizing": ["Resizing"],
  },
)

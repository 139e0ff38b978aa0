"""Policies that delete and insert: texts find their length on a fixed canvas."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={"indel": ["InDel"]},
)

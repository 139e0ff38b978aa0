"""Self-speculation: `speculate` writes autoregressive texts by tested drafts."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={"rounds": ["speculate"]},
)

"""lm-evaluation-harness: the model class, and published protocols.

`DiffusionLM` answers a harness's requests under a `Protocol`; it needs the extra
`eval`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "model": ["DiffusionLM"],
    "protocols": ["named", "Protocol"],
  },
)

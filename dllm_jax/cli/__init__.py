"""The console command: parsing and printing, no logic.

`main` dispatches, `command` is what commands share, `commands` holds them, one a
file.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "main": ["console", "main"],
  },
)

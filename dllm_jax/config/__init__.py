"""Configurations: files, their fields, and the objects made of them.

`load("smoke")` returns every field of a bundled or own file, to be changed;
`parse` makes a `Config` of frozen dataclasses of it, whose `build` makes the
objective and the network; `stored` reads what a run was begun with.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "config": [
      "Config",
      "differences",
      "load",
      "parse",
      "resolve",
      "stored",
    ],
    "files": ["bundled", "find", "machines"],
  },
)

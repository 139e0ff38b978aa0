"""What a generation did, step by step: data, pages, pictures, the terminal.

`films` makes events of a `Trace`; `write_page` plays them in one HTML file,
`write_strip` and `write_picture` show moments, `Widget` plays them in a notebook.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "picture": ["write_picture"],
    "strip": ["write_strip"],
    "terminal": ["play", "Widget"],
    "trace": ["Event", "Film", "films", "Trace", "write_page"],
  },
)

"""Serving: requests that join and leave one program, by OpenAI's conventions.

`Engine` fills rows, `Request` is one of them. `http` answers requests of clients:
`Model` is what is served, and `serve` serves it until it is told to end.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "engine": ["Engine"],
    "http": ["application", "Limits", "Model", "serve"],
    "requests": ["Committed", "Draft", "Finished", "Request"],
  },
)

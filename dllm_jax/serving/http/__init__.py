"""OpenAI's conventions over HTTP: a model's routes, streams and limits.

A request passes `gate` (keys, sizes, times); `protocol`, `prompts` and `wishes`
say what it asks for; each `answer` hears the engine and makes text of tokens
(`text`); `forms` and `stream` send it. `routes` puts them together, `server` runs
them.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "limits": ["Limits", "Refusal"],
    "routes": ["application"],
    "server": ["serve", "Server"],
    "model": ["Model"],
  },
)

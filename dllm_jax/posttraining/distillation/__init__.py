"""Distillation: networks that need fewer calls for the same text.

`DParallel` and `D3LLM` teach a masked diffusion to be sure of several tokens at
once, on its own answers (`answers`); `DCD` teaches a uniform one to take steps
that are twice as long, on text. `distil` does all of it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "d3llm": ["D3LLM"],
    "dcd": ["DCD"],
    "dparallel": ["DParallel"],
    "student": ["distil"],
  },
)

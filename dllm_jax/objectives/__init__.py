"""One file for each published system: corruption, loss, one reverse step.

An objective is a frozen dataclass that meets `core.Objective`: `draw` is all its
randomness for a batch, `loss` a function of what was drawn, `posterior` and
`reverse` what samplers need. `objective_class("mdlm")` finds one by name, a
file of this folder or an entry point; `MDLM.over(space)` builds it over a
vocabulary. `Discrete` is what a new one usually inherits.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "autoregressive": ["Autoregressive"],
    "base": ["Discrete", "Drawn", "TokenSpace"],
    "bd3lm": ["BD3LM"],
    "d3pm": ["D3PM"],
    "diffusion_lm": ["DiffusionLM"],
    "dream": ["Dream"],
    "genmd4": ["GenMD4"],
    "gidd": ["GIDD"],
    "llada": ["LLaDA"],
    "magvit2": ["MAGVIT2"],
    "md4": ["MD4"],
    "mdlm": ["MDLM"],
    "mmada": ["MMaDA"],
    "registry": ["objective_class", "objectives"],
    "sedd": ["SEDD"],
    "udlm": ["UDLM"],
  },
)

"""Methods of reinforcement learning of diffusion: masks, scores and losses.

`DiffuGRPO`, `CoupledGRPO`, `TraceRL`, `ESPO`, `SPG`, `WD1`, each with its
published defaults, and with the choices in which ports differ as fields.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "coupled_grpo": ["CoupledGRPO"],
    "diffu_grpo": ["DiffuGRPO"],
    "espo": ["ESPO"],
    "spg": ["SPG"],
    "tracerl": ["TraceRL"],
    "wd1": ["WD1"],
  },
)


def by_name(name: str) -> type:
  """Returns the class of a method.

  Raises:
    KeyError: there is no such method.
  """
  found = {one.name: one for one in map(__getattr__, __all__)}
  if name not in found:
    raise KeyError(f"unknown method {name!r}; legal: {', '.join(found)}")
  return found[name]

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

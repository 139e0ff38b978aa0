"""Attention: one function, its kernels, and positions over devices.

`attention` dispatches by mask spec, mesh and implementation; `scores` is the
reference, `splash` the TPU kernel, `context` what crosses devices.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  # Kernels of accelerators: a command on a CPU begins without them.
  submodules={"flash", "kept", "splash"},
  submod_attrs={
    "dispatch": ["attention"],
  },
)

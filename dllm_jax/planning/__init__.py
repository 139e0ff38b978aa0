"""What a program would cost on a machine that is not here.

`plan` compiles the train step or the sampler for a `Machine` and reads the
program: memory, time by roofline, what crosses wires; `search` tries meshes.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "plan": ["Plan", "plan"],
    "search": ["search"],
  },
)

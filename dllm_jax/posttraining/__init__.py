"""Training that begins with another run's parameters and has its own loss.

`run.begin` makes the working directory, `train` trains it. A method is a frozen
dataclass with an objective's two halves, `draw` and `loss`, over a batch of its
own.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "train": ["train"],
  },
)

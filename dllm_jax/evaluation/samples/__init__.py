"""Judges of samples, and what samples cost.

`open_judge` opens an autoregressive model that scores texts; `quality` has
entropies, diversity and MAUVE; `Traffic` counts what a sampler computes and moves.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "judge": ["Judge", "open_judge"],
    "quality": ["distinct", "mauve", "self_bleu", "unigram_entropy"],
    "traffic": ["Traffic"],
  },
)

"""Likelihoods of documents and of answers, by estimators with their error.

`Scorer` launches estimators (`estimators`) over rows of any length; `documents`
cuts and averages texts, `contexts` fits prompts, `Rules` undoes word-wise corpora;
`Reader` says how likely each token of a text is, from left to right.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "detokenize": ["Rules"],
    "reading": ["Reader"],
    "scorer": ["Item", "Scorer"],
  },
)

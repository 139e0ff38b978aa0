"""Pictures as tokens: where they are in a vocabulary, and codes without a table.

`ImageVocabulary` has the ids, `lookup_free` makes codes of features.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={"vocabulary": ["ImageVocabulary"]},
)

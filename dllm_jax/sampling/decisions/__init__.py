"""Decisions: questions about a text, answered by labels in one network call.

`Question` says what is asked, `laid_out` puts all questions of a context on one
canvas with masks at the answers, `read` makes answers of how likely the network
holds each label there. `Calibration` is a temperature that was fitted.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "answers": ["Answer", "Calibration", "calibration_error", "fitted"],
    "layout": ["laid_out", "Layout", "Question"],
    "reader": ["Reader"],
  },
)

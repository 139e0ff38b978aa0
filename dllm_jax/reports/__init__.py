"""Measurements and comparisons of runs, as tables, plots and pages.

`report` writes one HTML page about runs, `compare` trains configurations at one
budget; `benchmark` times the train step and the sampler, `benchmark_loss` the
vocabulary loss.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  # Modules: a function of the same name would hide the rest of its file.
  submodules=["compare", "report"],
)

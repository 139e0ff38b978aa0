"""Figures that carry their protocol and their error.

`likelihood` estimates log p of texts and answers, `samples` judges what was
sampled, `benchmarks` asks and marks problems, `harness` is the model class of
lm-evaluation-harness, `tasks` holds what `dllm evaluate --task=NAME` runs.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submodules=["benchmarks", "harness", "likelihood", "samples", "tasks"],
)

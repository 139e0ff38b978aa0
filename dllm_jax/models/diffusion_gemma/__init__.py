"""DiffusionGemma: `gemma(GemmaConfig(...))`; `network` says what it computes."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={"config": ["GemmaConfig", "Kind"], "network": ["gemma"]},
)

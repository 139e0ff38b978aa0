"""Networks that look at pictures: `Classifier`, which judges them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={"classifier": ["Classifier"]},
)

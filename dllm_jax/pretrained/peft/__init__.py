"""Adapters in PEFT's folders: `adapter_model.safetensors`, `adapter_config.json`.

`save_adapter` writes those of a network and `load_adapter` reads them onto one,
named by the modules of the published network that the matrices come from.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={"load": ["load_adapter"], "save": ["save_adapter"]},
)

"""Networks behind `Denoiser(init, apply)`; the only room that knows Flax.

`transformer(TransformerConfig(...))` is the LLaMA-like network, `dit` the one
that MDLM, SEDD and BD3-LM were published with. `attention` is attention by a mask
spec, `empty_cache` makes keys and values to be filled, `merge_adapters` multiplies
low-rank adapters out.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "attention": ["attention"],
    "cache": ["empty_cache"],
    "dit": ["dit", "DiTConfig"],
    "adapters": ["DoRA", "LoRA", "merge_adapters", "without_adapters"],
    "diffusion_gemma.config": ["GemmaConfig"],
    "diffusion_gemma.network": ["gemma"],
    "image_tokenizer": ["image_tokenizer", "ImageTokenizerConfig"],
    "transformer": ["transformer", "TransformerConfig"],
  },
)

"""Sampling: one program for every objective, policy and cache.

`SamplerConfig(preset="llada", steps=32).build(objective, length=...)` makes a
`Sampler`; `continuation` and `parse` make templates of texts, `build` makes
`Requests` of them; `generate` is the pure function, `Launcher` its compiled form,
`Generation` what comes out. `Generator` goes from texts to texts. Policies are in
`policies`, pages and pictures of a generation in `traces`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "generator": ["Generator", "Sampled"],
    "infill": ["parse"],
    "launch": ["Launcher"],
    "options": ["RowOptions", "stack"],
    "policies": [
      "Ancestral",
      "FirstHitting",
      "Temperature",
      "TopK",
      "TopP",
      "Unmasking",
    ],
    "presets": ["SamplerConfig"],
    "program": ["generate", "Generation"],
    "requests": ["build", "continuation", "Requests"],
    "sampler": ["Sampler"],
    "traces": ["films", "Trace", "write_page", "write_strip"],
  },
)

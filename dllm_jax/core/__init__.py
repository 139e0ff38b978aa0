"""The nouns and the numerics that every room shares.

`Batch` is what is learned from, `Denoiser` a network, `Process` the arrays of a
corruption, `Objective` a diffusion, `Noise` where a sampler's draws come from.
Schedules say how much is kept at time t; mask specs, which positions see which;
`reduce` and `cross_entropy` read a vocabulary without an array of positions times
vocabulary.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "types": [
      "Batch",
      "Denoiser",
      "KVCache",
      "Loss",
      "ModelInputs",
      "ModelOutputs",
      "Noise",
      "Objective",
      "Process",
    ],
    "mask": ["BlockCausal", "Causal", "Full", "materialise", "TwoStream"],
    "noise": ["Keyed", "Recorded", "Tag"],
    "schedule": [
      "Cosine",
      "CosineSquared",
      "Geometric",
      "Linear",
      "Logarithmic",
      "LogLinear",
      "Polynomial",
      "Schedule",
      "SigmaLinear",
      "Sine",
    ],
    "time": ["draw_times"],
    "vocabulary": ["cross_entropy", "forbid", "reduce"],
  },
)

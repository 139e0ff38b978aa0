"""Which slots of a window a network call reveals, and by which logits.

A policy is a frozen dataclass that meets `Policy`. `Ancestral` follows the
objective's posterior, `FirstHitting` its jumps; `Unmasking` is a score, a selection
(how many) and a revision (what becomes of tokens that stand); `ReMDM` masks again;
`Psi` and `Renoise` serve processes that replace tokens. Processors change the
logits that tokens are drawn from, `Guidance` joins two branches of the network.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "ancestral": ["Ancestral", "Stepwise"],
    "control": ["Controlled", "LatentClassifier"],
    "guidance": ["Guidance"],
    "policy": ["Policy"],
    "processors": [
      "Banned",
      "Forced",
      "RepetitionPenalty",
      "Temperature",
      "TopK",
      "TopP",
    ],
    "remasking": [
      "Cap",
      "Conf",
      "FlowCorrector",
      "ForwardBackward",
      "Loop",
      "ReMDM",
      "Rescale",
    ],
    "renoising": ["Psi", "Renoise"],
    "revision": ["Edit", "MaskPredict"],
    "selection": [
      "Chance",
      "CosinePlan",
      "EntropyBound",
      "Even",
      "Everything",
      "Factor",
      "Proportional",
      "Threshold",
      "Truncated",
    ],
    "speculation": ["Speculation"],
    "unmasking": ["FirstHitting", "Unmasking"],
  },
)

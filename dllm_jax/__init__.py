"""Diffusion language models in JAX: train, evaluate and sample on meshes.

`Run` is a working directory and what it can do; `load_pretrained` reads a
published folder. The rooms, from the nouns up: `core`, `objectives`, `models`,
`parallel`, `data`, `sampling`, `training`, `pretrained`, `config`, `run`,
`posttraining`, `evaluation`, `planning`, `reports`, `serving`, `cli`;
`help(dllm_jax.sampling)` tells what to call in one. Everything is imported when it
is first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submodules=[
    "cli",
    "config",
    "core",
    "data",
    "evaluation",
    "models",
    "objectives",
    "parallel",
    "planning",
    "posttraining",
    "pretrained",
    "reports",
    "run",
    "sampling",
    "serving",
    "training",
  ],
  submod_attrs={
    "pretrained": ["load_pretrained", "Pretrained", "save_pretrained"],
    "run": ["Run"],
  },
)

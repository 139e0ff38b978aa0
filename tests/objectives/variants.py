"""Which further settings of registered objectives pass the generic tests.

Every objective is tested with its defaults; these are settings that take another
path. The tests themselves name none.
"""

from dllm_jax.core import schedule
from dllm_jax.objectives import (
  d3pm_schedule,
  d3pm_transition,
  gidd,
  registry,
)
from dllm_jax.objectives.base import TokenSpace

_BELL = {"transition": d3pm_transition.Gaussian(), "steps": 20}

VARIANTS = {
  "d3pm": {
    "absorbing": {"transition": d3pm_transition.Absorbing()},
    "mix": {"transition": d3pm_transition.MaskUniform()},
    "bell": _BELL | {"schedule": d3pm_schedule.LinearBeta(start=0.1, stop=0.4)},
    "band": {"transition": d3pm_transition.Band(bands=1), "steps": 20},
  },
  "sedd": {
    "uniform": {"graph": "uniform"},
    "uniform, geometric": {
      "graph": "uniform",
      "schedule": schedule.Geometric(sigma_min=1e-3, sigma_max=8.0),
    },
  },
  "gidd": {"sigmoid": {"noise": gidd.Sigmoid()}},
  "mdlm": {
    "T": {"steps": 10},
    "importance": {"time_change": "importance_sampling"},
    "shifted": {"shift": 1, "weighting": "uniform", "kept_weight": 0.1},
  },
  "md4": {"T": {"steps": 10}},
  "udlm": {"T": {"steps": 10}},
  "diffusion_gemma": {
    "canvases": {"canvas": 8, "without": "mean"},
    "leave one out": {"canvas": 8, "leave_one_out": True},
  },
  "bd3lm": {"clipped": {"clip_low": 0.3, "clip_high": 0.8}},
}


def objectives(space: TokenSpace) -> dict:
  """Returns every registered objective over a space, with its variants."""
  assert VARIANTS.keys() <= registry.objectives().keys()
  found = {}
  for name in registry.objectives():
    cls = registry.objective_class(name)
    found[name] = cls.over(space)
    for variant, fields in VARIANTS.get(name, {}).items():
      found[f"{name}, {variant}"] = cls.over(space, **fields)
  return found

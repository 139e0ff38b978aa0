"""The demo: masked diffusion on tiny Shakespeare by byte pairs, minutes on a CPU.

shakespeare.py with what ends the plateau of its beginning early, as measured in
docs/comparison.md.

dllm train --config=configs/demo.py --workdir=runs/demo
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "shakespeare",
    "data": {"tokenizer": "bpe:2048"},
    "objective": {"shift": 1, "weighting": "uniform"},
    "training": {"steps": 800},
    "evaluation": {"every_steps": 400, "sample_every": 400},
    "sampler": {"temperature": 0.8},  # surer of its words, less surprising
  })

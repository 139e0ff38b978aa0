"""Countdown learned from its verifier: a small model on its own answers.

    dllm evaluate --task=planning --workdir=runs/countdown --problems=countdown3
    dllm reinforce --workdir=runs/countdown/mdlm \
        --config=configs/reinforce_countdown.py

The first line makes a model that writes steps, most of them wrong; the second
one teaches it from what the rules say of those.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "planning",
    "data": {"length": 36},
    "optimizer": {
      "name": "adamw",
      "learning_rate": 1e-4,
      "schedule": "constant",
      "warmup_steps": 0,
      "weight_decay": 0.0,
    },
    "training": {"steps": 240, "batch_size": 64},
    "checkpoint": {"every_steps": 60, "keep": 2},
    "evaluation": {"every_steps": 60, "batch_size": 100, "batches": 2},
    "sampler": {"preset": "llada", "temperature": 1.0, "steps": 12},
    "logging": {"every_steps": 10, "tensorboard": False},
    "reinforce": {
      "method": "espo",
      "problems": "countdown3",
      "count": 4000,
      "held_out": 200,
      "rewards": "countdown=1,countdown_steps=0.5",
      "prompts": 32,
      "seed": 1,
    },
    "espo": {"group": 8, "iterations": 2, "samples": 2},
    "diffu_grpo": {"group": 8, "iterations": 2},
    "coupled_grpo": {"group": 8, "iterations": 2},
    "tracerl": {"shrink": 3, "keep_low": 0.0, "keep_high": 2.0},
    "spg": {"group": 8, "iterations": 2, "block_length": 6},
    "wd1": {"group": 8, "iterations": 2},
  })

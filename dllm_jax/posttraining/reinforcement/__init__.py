"""Reinforcement learning: rollouts by the sampler, rewards, updates, in one run.

    prompts -> groups of rollouts -> rewards -> advantages -> updates

`methods` are the losses, `rewards` what answers earn, `Reinforcement` the loop.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "loop": ["Reinforce", "Reinforcement"],
    "rollouts": ["Rollouts"],
  },
)

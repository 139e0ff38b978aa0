"""Training: the step, its optimiser, the loop, checkpoints, metrics.

`Trainer` holds a step as a pure function of `TrainState` and a batch, `Optimizer`
says how it descends, `Loop` runs it with `Hooks`, `Checkpoints` keeps what it made,
`HeldOut` evaluates held-out text.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
  __name__,
  submod_attrs={
    "checkpoint": ["Checkpoint", "Checkpoints"],
    "held_out": ["Evaluation", "HeldOut"],
    "loop": ["Hooks", "Loop"],
    "metrics": ["latest", "Logging", "MetricWriter"],
    "optimizer": ["Optimizer"],
    "program": ["compile_program", "Program"],
    "served": ["Served"],
    "step": ["Trainer", "Training", "TrainState"],
    "step_log": ["NonFiniteLossError"],
  },
)

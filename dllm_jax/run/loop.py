"""The training loop of a run: what its configuration says, around any step."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from dllm_jax import training
from dllm_jax.core.paths import Path
from dllm_jax.core.types import Batch
from dllm_jax.parallel.watch import Watch


def training_loop(
  run: Any,
  workdir: Path,
  *,
  program: "training.Program",
  batches: Iterator[Batch],
  hooks: "training.Hooks",
  model_flops: Callable[[], int],
) -> "training.Loop":
  """Returns the loop that trains a run as configured.

  Args:
    run: the run; its configuration and its mesh are used.
    workdir: the directory to write into.
    program: the train step.
    batches: what to train on.
    hooks: what is called besides.
    model_flops: () -> FLOPs of a step over all devices, for the log.
  """
  config = run.config
  return training.Loop(
    program=program,
    batches=batches,
    checkpoints=training.Checkpoints(
      workdir,
      keep=config.checkpoint.keep,
      keep_first=program.trains is not None,
    ),
    writer=lambda step: training.MetricWriter(
      workdir,
      config.logging,
      resumed_step=step,
      config=run.resolved.to_dict(),
      active=jax.process_index() == 0,
    ),
    steps=config.training.steps,
    save_every=config.checkpoint.every_steps,
    logging=config.logging,
    mesh=run.mesh,
    hooks=hooks,
    learning_rate=config.optimizer.learning_rates(config.training.steps),
    workdir=workdir,
    watch=Watch(
      hang_seconds=config.training.hang_seconds,
      heartbeat_seconds=config.training.heartbeat_seconds,
    ),
    model_flops=model_flops,
    profile_steps=config.training.profiled(),
  )

"""Training a run with the loss and the batches of a method.

The loop, its checkpoints and its log are those of `dllm train`.
"""

from collections.abc import Callable, Iterator
import dataclasses
from typing import Any

import jax
from jaxtyping import PyTree

from dllm_jax.core.types import Batch, Objective
from dllm_jax.parallel import RULES
from dllm_jax.run.loop import training_loop
from dllm_jax.run.run import Run
from dllm_jax.training.loop import Hooks
from dllm_jax.training.program import compile_program
from dllm_jax.training.step import Trainer, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Grown(Trainer):
  """A trainer of more than a network's parameters."""

  grown: Callable[[PyTree], PyTree]

  def untrained(self, batch: Batch) -> TrainState:
    """Returns fresh parameters, and what is made of them."""
    state = super().untrained(batch)
    own = self.grown(state.params["model"])
    return state.replace(params={**state.params, "process": own})


def trainer(
  run: Run,
  objective: Objective,
  grown: Callable[[PyTree], PyTree] | None = None,
) -> Trainer:
  """Returns the trainer of a run with another loss, as `train` is told."""
  fields = {
    f.name: getattr(run.trainer, f.name) for f in dataclasses.fields(Trainer)
  } | {"objective": objective}
  return Trainer(**fields) if grown is None else _Grown(grown=grown, **fields)


def train(
  run: Run,
  objective: Objective,
  *,
  batches: Iterator[Batch],
  blank: Batch,
  evaluate: Callable[[TrainState], dict[str, float]] | None = None,
  collect: Callable[[TrainState], dict[str, float]] | None = None,
  sample: Callable[[TrainState], list[str]] | None = None,
  grown: Callable[[PyTree], PyTree] | None = None,
) -> dict[str, Any]:
  """Trains a run, or continues, to its configured step; returns a summary.

  Args:
    run: the run, as `begin` returns it.
    objective: the method: `draw` and `loss` are its own, the rest is that of
      the run's objective.
    batches: this process's rows of each batch, with `get_state` and
      `set_state`, as `data.BatchIterator` has them.
    blank: any batch of that form over all processes; for its shapes.
    evaluate: what is logged after every `evaluation.every_steps` and last.
    collect: makes what the next batch is of, as `Hooks` have it.
    sample: texts for the log; by default a sample of the run.
    grown: of the network's parameters those of the process that train beside
      them, as `begin` was told.

  Raises:
    NonFiniteLossError: the loss is not finite; the last good checkpoint stays.
  """
  evaluation = run.config.evaluation
  hooks = Hooks(
    evaluate=evaluate,
    evaluate_every=evaluation.every_steps,
    collect=collect,
    sample=sample or (lambda state: run.sample(state=state).texts),
    sample_every=evaluation.sample_every,
  )
  with jax.set_mesh(run.mesh):
    own = trainer(run, objective, grown)
    program = compile_program(own, blank, run.mesh, RULES)
    loop = training_loop(
      run,
      run.workdir,
      program=program,
      batches=batches,
      hooks=hooks,
      model_flops=lambda: own.model_flops(program.abstract, blank),
    )
  return run.follow(loop)

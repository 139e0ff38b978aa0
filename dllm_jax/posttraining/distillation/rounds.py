"""Training in rounds, each with a teacher of its own: the student of its start.

The teacher lies among the constants of the process, which no checkpoint of the
student has, so that the run stays an ordinary one; it is kept beside them, in
`teacher/STEP`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from dllm_jax import data
from dllm_jax.core.paths import Path
from dllm_jax.core.types import Batch, Process
from dllm_jax.parallel import distributed, RULES
from dllm_jax.posttraining.distillation.dcd import Consistent, DCD
from dllm_jax.run.loop import training_loop
from dllm_jax.run.run import Run
from dllm_jax.training.checkpoint import Checkpoints
from dllm_jax.training.loop import Hooks
from dllm_jax.training.program import compile_program, Program
from dllm_jax.training.step import Trainer, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Taught(Trainer):
  """A trainer whose process has a teacher among its constants."""

  def untrained(self, batch: Batch) -> TrainState:
    """Returns fresh parameters; the teacher has the same."""
    state = super().untrained(batch)
    teacher = state.params["model"]
    return state.replace(process=state.process.replace(constants=teacher))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rounds(Program):
  """A train step with the teachers of its rounds.

  Attributes:
    method: says when a round begins.
    folder: where teachers are kept.
  """

  method: DCD
  folder: Path

  def restore(
    self, checkpoints: Checkpoints
  ) -> tuple[TrainState, dict[str, Any]] | None:
    """Returns the newest saved state, with the teacher of its round."""
    restored = super().restore(checkpoints)
    if restored is None:
      return None
    state, data_state = restored
    begun = int(state.step) // self.method.round_steps * self.method.round_steps
    if begun == int(state.step):
      return self.begin_round(state), data_state
    return self._with(state, self._read(begun)), data_state

  def begin_round(self, state: TrainState) -> TrainState:
    """Returns the state with the student as teacher, where a round begins."""
    step = int(state.step)
    if step % self.method.round_steps:
      return state
    averaged = self.method.teacher == "averaged"
    params = state.eval_params if averaged else state.params
    teacher = jax.tree.map(_copy, params["model"], self._abstract)
    with Checkpoints(self.folder / str(step)) as kept:
      if not kept.steps():
        kept.save_imported(teacher, Process())
    with distributed.together():
      if jax.process_index() == 0:
        # A student that is resumed is of this round or of the one before.
        old = step - 2 * self.method.round_steps
        (self.folder / str(old)).rmtree(missing_ok=True)
    return self._with(state, teacher)

  @property
  def _abstract(self) -> PyTree:
    return self.abstract.process.constants

  def _with(self, state: TrainState, teacher: PyTree) -> TrainState:
    return state.replace(process=state.process.replace(constants=teacher))

  def _read(self, step: int) -> PyTree:
    """Returns the teacher of the round that began at a step.

    Raises:
      FileNotFoundError: it is not there.
    """
    abstract = self.abstract.replace(
      params={"model": self._abstract, "process": {}},
      process=Process(),
      ema_params=None,
      opt_state=None,
    )
    with Checkpoints(self.folder / str(step), writes=False) as kept:
      restored = kept.restore(abstract)
    if restored is None:
      raise FileNotFoundError(
        f"{self.folder / str(step)}, the teacher of this round, is missing: "
        "restore it from a copy of the run"
      )
    return restored[0].params["model"]


def _copy(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
  """Returns a copy: a step takes the student's own memory."""
  return jax.device_put(jnp.array(x, like.dtype, copy=True), like.sharding)


def _nothing(abstract: PyTree) -> PyTree:
  """Returns zeros, until there is a teacher."""
  zeros = lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding)
  return jax.tree.map(zeros, abstract)


def compiled(run: Run, method: DCD, blank: Batch) -> tuple[Taught, Rounds]:
  """Returns the trainer of a run, and its step with a teacher."""
  fields = {
    f.name: getattr(run.trainer, f.name) for f in dataclasses.fields(Trainer)
  }
  fields["objective"] = Consistent(
    objective=run.objective, denoiser=run.denoiser, method=method
  )
  trainer = Taught(**fields)
  program = compile_program(trainer, blank, run.mesh, RULES)
  parts = {
    f.name: getattr(program, f.name) for f in dataclasses.fields(Program)
  }
  parts["served"] = dataclasses.replace(
    program.served,
    constants=lambda: _nothing(program.abstract.process.constants),
  )
  folder = run.workdir / "teacher"
  return trainer, Rounds(method=method, folder=folder, **parts)


def train(run: Run, method: DCD) -> dict[str, Any]:
  """Trains a run on its text, or continues, to its configured step.

  Held-out text is evaluated at the end of each round.
  """
  config = run.config
  blank = data.blank(config.training.batch_size, config.data.length)
  with jax.set_mesh(run.mesh):
    trainer, program = compiled(run, method, blank)
    hooks = Hooks(
      evaluate=run.held_out.while_training if run.corpus.held_out else None,
      evaluate_every=method.round_steps,
      adapt=program.begin_round,
      sample=lambda state: run.sample(state=state).texts,
      sample_every=config.evaluation.sample_every,
    )
    loop = training_loop(
      run,
      run.workdir,
      program=program,
      batches=run.batches(),
      hooks=hooks,
      model_flops=lambda: trainer.model_flops(program.abstract, blank),
    )
  return run.follow(loop)

"""The compiled train step: its placement, what it begins with and goes on from."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jaxtyping import PyTree
import numpy as np

from dllm_jax.core.types import Batch
from dllm_jax.models import without_adapters
from dllm_jax.models.quantised import stored
from dllm_jax.parallel import compilation
from dllm_jax.parallel.sharding import shardings
from dllm_jax.training.checkpoint import abstract_state, Checkpoints
from dllm_jax.training.served import paths, Served, served
from dllm_jax.training.step import Trainer, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """The compiled train step and the placement of its state.

  Attributes:
    step: `(state, batch) -> (state, metrics)`, jitted; the state is donated.
    init: `() -> state`, jitted: every device makes its own shards.
    adopt: `(state) -> state`, jitted: adds to imported parameters what they
      come without: adapters, averages, the optimiser's state.
    abstract: shapes, types and shardings of the state.
    served: of what a state is made up but for the optimiser's.
  """

  step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
  init: Callable[[], TrainState]
  adopt: Callable[[TrainState], TrainState]
  abstract: TrainState
  served: Served

  @property
  def trains(self) -> PyTree | None:
    """True at the parameters that train; None if all do."""
    return self.served.trains

  def restore(
    self, checkpoints: Checkpoints
  ) -> tuple[TrainState, dict[str, Any]] | None:
    """Returns the newest saved state and its data state, None if none was.

    Raises:
      ValueError: there are checkpoints, and none can be read.
    """
    abstract = self.abstract.replace(params=stored(self.abstract.params))
    restored = checkpoints.restore(abstract, trains=self.trains)
    if restored is None:
      return None
    state, data_state = restored
    if state.opt_state is not None:
      return self.served.finished(state), data_state
    constants = self.served.constants()
    process = state.process.replace(constants=constants)
    return self.adopt(state.replace(process=process)), data_state

  def begin(self, checkpoints: Checkpoints) -> TrainState:
    """Returns the state of step 0; what never trains is saved in it, once."""
    if self.trains is None:
      return self.init()
    state = self.served.untrained()
    model = without_adapters(state.params["model"])
    process = state.process.replace(params=state.params["process"])
    checkpoints.save_imported(model, process)
    # Read back, so that a run that is resumed begins with the same numbers.
    return self.restore(checkpoints)[0]


def compile_program(trainer: Trainer, batch: Batch, mesh, rules) -> Program:
  """Returns the train step, jitted over a mesh.

  Args:
    trainer: objective, network and optimiser.
    batch: any global batch; only its shapes are used.
    mesh: the device mesh.
    rules: placement of parameters, as in `parallel.sharding`.
  """
  loaded = served(trainer, batch, mesh, rules)
  fresh = jax.eval_shape(trainer.untrained, batch)
  shapes = jax.eval_shape(trainer.begin, fresh)
  placed = shardings(shapes, mesh, rules)
  empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch)

  def adopt(state: TrainState) -> TrainState:
    fresh, have = trainer.untrained(empty), paths(state.params)
    params = jax.tree_util.tree_map_with_path(
      lambda path, leaf: have.get(path, leaf), fresh.params
    )
    return trainer.begin(state.replace(params=params))

  jit = functools.partial(compilation.jit, mesh=mesh)
  return Program(
    step=jit(
      trainer.step,
      donate_argnums=0,
      out_shardings=(placed, None),
      dtype=trainer.denoiser.dtype,
      options=compilation.step_options(mesh),
    ),
    init=jit(lambda: trainer.init(empty), out_shardings=placed),
    adopt=jit(adopt, out_shardings=placed),
    abstract=abstract_state(shapes, placed),
    served=loaded,
  )

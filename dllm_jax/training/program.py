"""The compiled train step: its placement, what it begins with and goes on from."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np

from dllm_jax.core.types import Batch
from dllm_jax.models import without_adapters
from dllm_jax.models.quantised import stored
from dllm_jax.parallel import compilation
from dllm_jax.parallel.sharding import shardings
from dllm_jax.training.checkpoint import abstract_state, Checkpoints
from dllm_jax.training.frozen import join
from dllm_jax.training.step import Trainer, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """The compiled train step and the placement of its state.

  Attributes:
    step: `(state, batch) -> (state, metrics)`, jitted; the state is donated.
    init: `() -> state`, jitted: every device makes its own shards.
    constants: `() -> process.constants`, jitted: what checkpoints leave out.
    untrained: `() -> state` of parameters alone, jitted, in the network's own
      type, nothing held otherwise: what a run that freezes them begins with.
    adopt: `(state) -> state`, jitted: adds to imported parameters what they
      come without: adapters, averages, the optimiser's state.
    freeze: `(params) -> params`, jitted: those that do not train as they are
      held, where they are held otherwise than stored; else None.
    abstract: shapes, types and shardings of the state.
    served: the same, with parameters in the network's own type: what is loaded
      to evaluate and sample.
    trains: True at the parameters that train; None if all do.
  """

  step: Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]
  init: Callable[[], TrainState]
  constants: Callable[[], PyTree]
  untrained: Callable[[], TrainState]
  adopt: Callable[[TrainState], TrainState]
  freeze: Callable[[PyTree], PyTree] | None
  abstract: TrainState
  served: TrainState
  trains: PyTree | None

  def restore(
    self,
    checkpoints: Checkpoints,
    *,
    to_train: bool = True,
    masters: bool = True,
  ) -> tuple[TrainState, dict[str, Any]] | None:
    """Returns the newest saved state and its data state, None if none was.

    Args:
      checkpoints: where it is saved.
      to_train: whether imported parameters get an optimiser's state.
      masters: whether parameters come in the type that they train in, not in
        the network's.

    Raises:
      ValueError: there are checkpoints, and none can be read.
    """
    abstract = self.abstract if to_train or masters else self.served
    abstract = abstract.replace(params=stored(abstract.params))
    restored = checkpoints.restore(abstract, trains=self.trains)
    if restored is None:
      return None
    state, data_state = restored
    process = state.process.replace(constants=self.constants())
    state = state.replace(process=process)
    if state.opt_state is None:
      if to_train:
        return self.adopt(state), data_state
      state = _evaluable(state, abstract)
    if self.freeze is not None:
      state = state.replace(params=self.freeze(state.params))
    return state, data_state

  def begin(self, checkpoints: Checkpoints) -> TrainState:
    """Returns the state of step 0; what never trains is saved in it, once."""
    if self.trains is None:
      return self.init()
    state = self.untrained()
    model = without_adapters(state.params["model"])
    process = state.process.replace(params=state.params["process"])
    checkpoints.save_imported(model, process)
    # Read back, so that a run that is resumed begins with the same numbers.
    return self.restore(checkpoints)[0]


def _evaluable(state: TrainState, abstract: TrainState) -> TrainState:
  """Returns imported parameters, with adapters that change nothing."""
  have = _paths(state.params)
  zeros = lambda leaf: jax.device_put(
    jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding
  )
  params = jax.tree_util.tree_map_with_path(
    lambda path, leaf: have[path] if path in have else zeros(leaf),
    abstract.params,
  )
  return state.replace(params=params)


def _paths(tree: PyTree) -> dict[tuple, Any]:
  return dict(jax.tree_util.tree_leaves_with_path(tree))


def compile_program(trainer: Trainer, batch: Batch, mesh, rules) -> Program:
  """Returns the train step, jitted over a mesh.

  Args:
    trainer: objective, network and optimiser.
    batch: any global batch; only its shapes are used.
    mesh: the device mesh.
    rules: placement of parameters, as in `parallel.sharding`.
  """
  shapes = jax.eval_shape(trainer.init, batch)
  placed = shardings(shapes, mesh, rules)
  empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch)

  def adopt(state: TrainState) -> TrainState:
    fresh, have = trainer.untrained(empty), _paths(state.params)
    params = jax.tree_util.tree_map_with_path(
      lambda path, leaf: have.get(path, leaf), fresh.params
    )
    return trainer.begin(state.replace(params=params))

  def freeze(params: PyTree) -> PyTree:
    trained, frozen = trainer.split(params)
    return join(trained, trainer.frozen(frozen))

  fresh = jax.eval_shape(trainer.untrained, batch)
  own = shardings(fresh, mesh, rules)
  served = shapes.replace(params=jax.eval_shape(freeze, fresh.params))
  if served.ema_params is not None:
    served = served.replace(ema_params=trainer.split(fresh.params)[0])
  jit = functools.partial(compilation.jit, mesh=mesh)
  return Program(
    step=jit(
      trainer.step,
      donate_argnums=0,
      out_shardings=(placed, None),
      options=compilation.step_options(mesh),
    ),
    init=jit(lambda: trainer.init(empty), out_shardings=placed),
    untrained=jit(
      lambda: trainer.untrained(empty).replace(opt_state=None),
      out_shardings=own.replace(ema_params=None, opt_state=None),
    ),
    constants=jit(
      lambda: trainer.init_process().constants,
      out_shardings=placed.process.constants,
    ),
    adopt=jit(adopt, out_shardings=placed),
    freeze=None if trainer.freeze is None else jit(freeze),
    abstract=abstract_state(shapes, placed),
    served=abstract_state(served, placed),
    trains=trainer.trains and trainer.trains(fresh.params),
  )

"""What is loaded of a run to evaluate and sample it: no optimiser's state."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
import numpy as np

from dllm_jax.core.rounding import widened
from dllm_jax.core.types import Batch
from dllm_jax.models.quantised import stored
from dllm_jax.parallel import compilation
from dllm_jax.parallel.sharding import shardings
from dllm_jax.training.checkpoint import abstract_state, Checkpoints
from dllm_jax.training.frozen import join
from dllm_jax.training.step import Trainer, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served:
  """Where the parameters of a run lie, and where they come from.

  Attributes:
    untrained: `() -> state` of parameters alone, jitted, in the network's own
      type, nothing held otherwise: what a run that freezes them begins with.
    constants: `() -> process.constants`, jitted: what checkpoints leave out.
    freeze: `(params) -> params`, jitted: those that do not train as they are
      held, where they are held otherwise than stored; else None.
    abstract: shapes, types and shardings of a state without an optimiser's.
    trains: True at the parameters that train; None if all do.
  """

  untrained: Callable[[], TrainState]
  constants: Callable[[], PyTree]
  freeze: Callable[[PyTree], PyTree] | None
  abstract: TrainState
  trains: PyTree | None

  def restore(self, checkpoints: Checkpoints) -> TrainState | None:
    """Returns the newest saved state, None if none was; reads nothing else of it.

    Raises:
      ValueError: there are checkpoints, and none can be read.
    """
    abstract = self.abstract.replace(params=stored(self.abstract.params))
    restored = checkpoints.restore(abstract, trains=self.trains)
    if restored is None:
      return None
    params = _completed(restored[0].params, abstract.params)
    return self.finished(restored[0].replace(params=params))

  def finished(self, state: TrainState) -> TrainState:
    """Returns a state that was read, with what is made and not saved."""
    process = state.process.replace(constants=self.constants())
    state = state.replace(process=process)
    if self.freeze is None:
      return state
    return state.replace(params=self.freeze(state.params))


def _completed(params: PyTree, abstract: PyTree) -> PyTree:
  """Returns imported parameters, with adapters that change nothing."""
  have = paths(params)
  zeros = lambda leaf: jax.device_put(
    jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding
  )
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: have[path] if path in have else zeros(leaf), abstract
  )


def paths(tree: PyTree) -> dict[tuple, Any]:
  """Returns the leaves of a tree by path."""
  return dict(jax.tree_util.tree_leaves_with_path(tree))


def served(
  trainer: Trainer, batch: Batch, mesh, rules, *, masters: bool = False
) -> Served:
  """Returns what is loaded of a run, placed on a mesh.

  Args:
    trainer: objective and network, and which parameters train.
    batch: any global batch; only its shapes are used.
    mesh: the device mesh.
    rules: placement of parameters, as in `parallel.sharding`.
    masters: parameters in the type that they train in, not the network's own.
  """
  empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), batch)
  wide = widened if masters else lambda params: params

  def held(params: PyTree) -> tuple[PyTree, PyTree]:
    trained, frozen = trainer.split(params)
    own = wide(trained) if trainer.rounding == "none" else trained
    return join(own, trainer.frozen(frozen)), wide(trained)

  fresh = jax.eval_shape(trainer.untrained, batch)
  own = shardings(fresh, mesh, rules)
  params, average = jax.eval_shape(held, fresh.params)
  if not trainer.training.ema_decay:
    average = None
  shapes = fresh.replace(params=params, ema_params=average)
  placed = shardings(shapes, mesh, rules)
  jit = functools.partial(compilation.jit, mesh=mesh)
  freeze = lambda params: _frozen(trainer, params)
  return Served(
    untrained=jit(lambda: trainer.untrained(empty), out_shardings=own),
    constants=jit(
      lambda: trainer.init_process().constants,
      out_shardings=own.process.constants,
    ),
    freeze=None if trainer.freeze is None else jit(freeze),
    abstract=abstract_state(shapes, placed),
    trains=trainer.trains and trainer.trains(fresh.params),
  )


def _frozen(trainer: Trainer, params: PyTree) -> PyTree:
  """Returns parameters, those that do not train as they are held."""
  trained, frozen = trainer.split(params)
  return join(trained, trainer.frozen(frozen))

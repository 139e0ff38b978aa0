"""What a process learns from held-out text, besides its gradients.

An objective says what it wants to know of a batch (`measure`) and what follows
from the sum over batches (`adapt`); clip intervals of block diffusion are found
so. Nothing here knows any one system.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree

from dllm_jax.core.types import Batch, Denoiser, Objective, Process
from dllm_jax.training.step import TrainState


def measures(objective: Objective, denoiser: Denoiser) -> Callable[..., PyTree]:
  """Returns `(params, process, key, batch) -> measures`, pure, to be jitted."""

  def run(params: PyTree, process: Process, key, batch: Batch) -> PyTree:
    def denoise(inputs):
      return denoiser.apply(params["model"], inputs, None)[0]

    process = process.replace(params=params["process"])
    return objective.measure(process, denoise, key, batch)

  return run


def summed(
  measure: Callable[[Key[Array, ""], Batch], PyTree],
  batches: Iterable[Batch],
  *,
  seed: int,
) -> PyTree:
  """Returns the measures of all batches, added.

  Args:
    measure: `(key, batch) -> measures`, compiled.
    batches: held-out batches.
    seed: the seed of the corruption.

  Raises:
    ValueError: there is no batch.
  """
  key, total = jax.random.key(seed), None
  for i, batch in enumerate(batches):
    found = measure(jax.random.fold_in(key, i), batch)
    total = found if total is None else jax.tree.map(jnp.add, total, found)
  if total is None:
    raise ValueError("the held-out text is empty: raise data.held_out")
  return total


def adapted(
  objective: Objective, state: TrainState, measured: PyTree
) -> TrainState:
  """Returns the state with its process adapted to measures of all batches."""
  process = objective.adapt(state.process, measured)
  # Placed as it was: to the train step it is the same kind of argument.
  placed = jax.tree.map(
    lambda new, old: jax.device_put(new, old.sharding), process, state.process
  )
  return state.replace(process=placed)

"""Checkpoints: train state and data-iterator state together, by Orbax.

Saves are asynchronous and atomic (a step's directory appears when it is
complete); restoring works onto any mesh. A newest checkpoint that cannot be read
is skipped, loudly, for the one before it.
"""

import dataclasses
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from dllm_jax.core.types import Process
from dllm_jax.training.step import TrainState

_LOGGER = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
  """When to save and how much to keep.

  Attributes:
    every_steps: steps between saves; the last step is always saved.
    keep: newest checkpoints that stay on disk.
  """

  every_steps: int = 500
  keep: int = 2

  def __post_init__(self):
    if self.every_steps < 1 or self.keep < 1:
      raise ValueError(
        "checkpoint.every_steps and checkpoint.keep must be at least 1, not "
        f"{self.every_steps} and {self.keep}"
      )


class Checkpoints:
  """The checkpoints of a working directory."""

  def __init__(self, workdir: str | pathlib.Path, *, keep: int = 2):
    """Opens `workdir/checkpoints`, which is made if it is missing.

    Args:
      workdir: the run's directory.
      keep: newest checkpoints that stay on disk.
    """
    directory = pathlib.Path(workdir).absolute() / "checkpoints"
    self._checkpointer = ocp.training.Checkpointer(
      directory,
      preservation_policy=ocp.training.preservation_policies.LatestN(keep),
      save_decision_policy=_Always(),
      cleanup_tmp_directories=True,
    )
    self._directory = directory

  def steps(self) -> list[int]:
    """Returns the steps of the complete checkpoints, oldest first."""
    return sorted(c.step for c in self._checkpointer.checkpoints)

  def save(self, state: TrainState, data_state: dict[str, Any]) -> None:
    """Starts to save; returns when the device arrays have been copied."""
    step = int(state.step)
    if step in self.steps():
      return
    self._checkpointer.save_checkpointables_async(
      step, {"state": _saved(state), "data": data_state}
    )

  def save_imported(self, params: PyTree, process: Process) -> None:
    """Writes step 0 of a run that begins with given parameters, and waits.

    Nothing of an optimiser is saved: `restore` returns `opt_state` None.

    Args:
      params: the network's parameters.
      process: the fresh process; its learned part is saved with them.
    """
    state = {
      "step": jnp.zeros((), jnp.int32),
      "params": {"model": params, "process": process.params},
      "process_state": process.state,
    }
    context = ocp.Context()
    # Weights hardly compress, and trying takes longer than writing.
    context.array.saving.use_compression = False
    with context:
      self._checkpointer.save_checkpointables_async(
        0, {"state": state, "data": {"imported": True}}
      )
      self.wait()

  def restore(
    self, abstract: TrainState
  ) -> tuple[TrainState, dict[str, Any]] | None:
    """Returns the newest readable state and its data state, None if none was.

    Of imported parameters, `opt_state` is None, adapters are left out, and the
    data state is empty.

    Args:
      abstract: shapes, types and shardings to restore onto, whatever mesh the
        checkpoint was written from.

    Raises:
      ValueError: there are checkpoints, and none can be read.
    """
    steps = self.steps()
    for step in reversed(steps):
      try:
        imported = step == 0 and self._imported(step)
        wanted = _imported(abstract) if imported else _saved(abstract)
        loaded = self._checkpointer.load_checkpointables(
          step, {"state": wanted, "data": None}
        )
      except Exception as error:  # pylint: disable=broad-except
        # Orbax and tensorstore raise many types for a damaged file.
        reason = " ".join(str(error).split())[:200]
        _LOGGER.warning(
          "checkpoint %d in %s cannot be read and is skipped: %s",
          step,
          self._directory,
          reason,
        )
        continue
      saved = loaded["state"]
      if imported:
        saved |= {"opt_state": None, "ema_params": None}
      state = abstract.replace(**_unsaved(abstract, saved))
      return state, {} if imported else loaded["data"]
    if steps:
      raise ValueError(
        f"no checkpoint in {self._directory} can be read (steps "
        f"{', '.join(map(str, steps))}); restore the directory from a copy or "
        "start in an empty --workdir"
      )
    return None

  def _imported(self, step: int) -> bool:
    data = self._checkpointer.load_checkpointables(step, {"data": None})["data"]
    return bool(data.get("imported"))

  def wait(self) -> None:
    """Waits until everything that was started is on disk."""
    self._checkpointer.wait()

  def close(self) -> None:
    """Waits and releases the writers."""
    self._checkpointer.close()


class _Always(ocp.training.save_decision_policies.SaveDecisionPolicy):
  """Saves whenever the loop says so: cadence is decided in one place."""

  def should_save(self, step, previous_steps, *, context) -> bool:
    del step, previous_steps, context
    return True


def _saved(state: TrainState) -> dict[str, PyTree]:
  """Returns what goes to disk: constants are rebuilt, never saved."""
  return {
    "step": state.step,
    "params": state.params,
    "process_state": state.process.state,
    "ema_params": state.ema_params if state.ema_params is not None else {},
    "opt_state": state.opt_state,
  }


def _imported(abstract: TrainState) -> dict[str, PyTree]:
  """Returns what an imported checkpoint holds of a state."""
  saved = _saved(abstract)
  params = dict(saved["params"])
  params["model"] = _without_adapters(params["model"])
  return {
    "step": saved["step"],
    "params": params,
    "process_state": saved["process_state"],
  }


def _without_adapters(params: PyTree) -> PyTree:
  if not isinstance(params, dict):
    return params
  return {
    name: _without_adapters(value)
    for name, value in params.items()
    if name not in ("lora_a", "lora_b")
  }


def _unsaved(abstract: TrainState, saved: dict[str, PyTree]) -> dict[str, Any]:
  fields = dict(saved)
  fields["process"] = abstract.process.replace(
    state=fields.pop("process_state")
  )
  if abstract.ema_params is None:
    fields["ema_params"] = None
  return fields


def abstract_state(state: TrainState, shardings: PyTree) -> TrainState:
  """Returns shapes and types of a state, with the shardings to restore onto."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    shardings,
  )

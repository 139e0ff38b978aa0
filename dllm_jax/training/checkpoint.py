"""Checkpoints: train state and data-iterator state together, by Orbax.

Saves are asynchronous and atomic (a step's directory appears when it is
complete, or in a bucket the object in it that says so); restoring works onto any mesh and any number of processes. A newest
checkpoint that cannot be read, by any one process, is skipped, loudly, for the
one before it; a run that continues from there moves it out of the way.
"""

from collections.abc import Callable
from concurrent import futures
import dataclasses
import logging
import os
import threading
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from dllm_jax.core import paths
from dllm_jax.core.files import move_folder
from dllm_jax.core.paths import Path
from dllm_jax.core.types import Process
from dllm_jax.models import without_adapters
from dllm_jax.parallel import distributed
from dllm_jax.training.frozen import join, split
from dllm_jax.training.staged import ALWAYS, complete, MARKER, Staged
from dllm_jax.training.step import TrainState

_LOGGER = logging.getLogger(__name__)
_POLICIES = ocp.training.preservation_policies

# The loop says when to save; Orbax then always does.
# A save that needs a process which is gone never ends.
_LAST_SAVE_SECONDS = 30.0


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

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    keep: int = 2,
    keep_first: bool = False,
    writes: bool = True,
  ):
    """Opens `workdir/checkpoints`, which is made if it is missing.

    Args:
      workdir: the run's directory.
      keep: newest checkpoints that stay on disk.
      keep_first: whether step 0 stays, too: it holds what does not train.
      writes: whether to save, too: what a save that was cut off has left is
        removed. Whoever only reads must not remove what another is writing.
    """
    directory = _directory(workdir)
    if paths.on_s3(directory):
      if writes and jax.process_count() > 1:
        raise ValueError(
          f"{workdir}: several processes cannot save on s3://, where Orbax does "
          "not write and each would have a part of the checkpoint on a disk of "
          "its own; use gs:// or a disk that all of them share"
        )
      self._checkpointer = Staged(directory, keep, keep_first)
    else:
      self._checkpointer = ocp.training.Checkpointer(
        directory,
        preservation_policy=_POLICIES.AnyPreservationPolicy([
          _POLICIES.LatestN(keep),
          _POLICIES.CustomSteps([0] if keep_first else []),
        ]),
        save_decision_policy=ALWAYS,
        cleanup_tmp_directories=writes,
      )
    self._directory = directory
    self._writes = writes

  def steps(self) -> list[int]:
    """Returns the steps of the complete checkpoints, oldest first."""
    return sorted(c.step for c in self._checkpointer.checkpoints)

  def save(
    self,
    state: TrainState,
    data_state: dict[str, Any],
    *,
    trains: PyTree | None = None,
  ) -> None:
    """Starts to save; returns when the device arrays have been copied.

    Args:
      state: the state.
      data_state: where the data is.
      trains: True at the parameters that train: the others, which step 0 holds,
        are not saved again. None if all train.
    """
    step = int(state.step)
    if step in self.steps():
      return
    self._checkpointer.save_checkpointables_async(
      step, {"state": _saved(state, trains), "data": data_state}
    )

  def save_imported(self, params: PyTree, process: Process) -> None:
    """Writes step 0 of a run that begins with given parameters, and waits.

    Nothing of an optimiser is saved: `restore` returns `opt_state` None.

    Args:
      params: the network's parameters, with adapters or without.
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
        0,
        {
          "state": state,
          "data": {"imported": True, "adapters": _adapted(params)},
        },
      )
      self.wait()

  def restore(
    self, abstract: TrainState, *, trains: PyTree | None = None
  ) -> tuple[TrainState, dict[str, Any]] | None:
    """Returns the newest readable state and its data state, None if none was.

    Of imported parameters, `opt_state` is None, adapters are left out unless
    they came with them, and the data state is empty.

    Args:
      abstract: shapes, types and shardings to restore onto, whatever mesh the
        checkpoint was written from. Without an optimiser's state, none is read.
      trains: True at the parameters that train; the others come from step 0.

    Raises:
      ValueError: there are checkpoints, and none can be read.
    """
    seen = [set(steps) for steps in distributed.exchange(self.steps())]
    steps = sorted(set.intersection(*seen))
    for step in reversed(steps):
      try:
        with distributed.together():
          imported, loaded = self._read(step, abstract, trains)
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
      if self._writes:
        self._put_aside([s for s in steps if s > step])
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

  def _put_aside(self, steps: list[int]) -> None:
    """Moves checkpoints away: they would count as the newest, and be kept."""
    if not steps:
      return
    aside = self._directory.parent / "unreadable"
    with distributed.together():
      if jax.process_index() == 0:
        aside.mkdir(exist_ok=True)
        for step in steps:
          number = len(list(aside.glob(f"{step}-*")))
          source = self._directory / str(step)
          move_folder(source, aside / f"{step}-{number}", MARKER)
    self._checkpointer.reload()
    _LOGGER.warning("what cannot be read was moved to %s", aside)

  def _read(
    self, step: int, abstract: TrainState, trains: PyTree | None
  ) -> tuple[bool, dict[str, Any]]:
    """Returns whether a step was imported, and what it holds with step 0.

    Each process reads its own shards and waits for no other, so that one which
    cannot read them can say so.
    """
    data = self._load(step, {"data": None})["data"]
    imported = step == 0 and bool(data.get("imported"))
    if imported:
      wanted = _imported(abstract, bool(data.get("adapters")))
    else:
      wanted = _saved(abstract, trains)
    partial = abstract.opt_state is None
    found = self._load(step, {"state": wanted}, partial=partial)["state"]
    if not imported and trains is not None:
      first = self._first(split(abstract.params, trains)[1])
      found["params"] = join(found["params"], first)
    return imported, {"state": found, "data": data}

  def _first(self, frozen: PyTree) -> PyTree:
    """Returns what step 0 holds of the parameters that do not train.

    Raises:
      ValueError: it cannot be read.
    """
    wanted = {"state": {"params": frozen}}
    try:
      return self._load(0, wanted, partial=True)["state"]["params"]
    except Exception as error:
      raise ValueError(
        f"step 0, which holds what does not train, cannot be read: {error}"
      ) from error

  def _load(
    self, step: int, wanted: dict[str, PyTree], *, partial: bool = False
  ) -> dict[str, PyTree]:
    """Returns what is wanted of a step; `partial`: not all that is there."""
    context = _alone()  # its own: Orbax has left it when the first load is done
    context.pytree.loading.partial_load = partial

    def load():
      with context:
        return self._checkpointer.load_checkpointables(step, wanted)

    # In the main thread Orbax's event loop would take Ctrl-C for itself.
    return started(load)()

  def wait(self) -> None:
    """Waits until everything that was started is on disk."""
    self._checkpointer.wait()

  def close(self) -> None:
    """Waits and releases the writers."""
    self._checkpointer.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, error, trace) -> None:
    if kind is None or distributed.store() is None:
      self.close()
      return
    # Others may be gone, and what was being saved with them.
    last = threading.Thread(target=self._checkpointer.close, daemon=True)
    last.start()
    last.join(_LAST_SAVE_SECONDS)


def started(make: Callable[[], Any]) -> Callable[[], Any]:
  """Calls a function in a thread; returns what waits for its result.

  No exit waits for the thread, so that Ctrl-C while it works ends the process.
  """
  made = futures.Future()

  def run():
    try:
      made.set_result(make())
    except BaseException as error:  # for whoever waits
      made.set_exception(error)

  threading.Thread(target=run, name=started.__name__, daemon=True).start()
  return made.result


def steps_in(workdir: str | os.PathLike) -> list[int]:
  """Returns the steps of the complete checkpoints of a run, oldest first."""
  return complete(_directory(workdir))


def _directory(workdir: str | os.PathLike) -> Path:
  return paths.absolute(paths.place(workdir)) / "checkpoints"


def _alone() -> ocp.Context:
  """Returns a context in which this process waits for no other."""
  context = ocp.Context()
  own = jax.process_index()
  context.multiprocessing.primary_host = own
  context.multiprocessing.active_processes = {own}
  return context


def _saved(state: TrainState, trains: PyTree | None) -> dict[str, PyTree]:
  """Returns what goes to disk: constants are rebuilt, never saved."""
  saved = {
    "step": state.step,
    "params": split(state.params, trains)[0],
    "process_state": state.process.state,
    "ema_params": state.ema_params if state.ema_params is not None else {},
    "opt_state": state.opt_state,
  }
  return {name: part for name, part in saved.items() if part is not None}


def _imported(abstract: TrainState, adapted: bool) -> dict[str, PyTree]:
  """Returns what an imported checkpoint holds of a state."""
  saved = _saved(abstract, None)
  params = dict(saved["params"])
  if not adapted:
    params["model"] = without_adapters(params["model"])
  return {
    "step": saved["step"],
    "params": params,
    "process_state": saved["process_state"],
  }


def _adapted(params: PyTree) -> bool:
  """Returns whether there are adapters among parameters."""
  count = lambda tree: len(jax.tree.leaves(tree))
  return count(without_adapters(params)) < count(params)


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

"""Several processes as one job: start-up, and agreement between them.

What processes tell each other goes through the key-value store of jax's
coordination service, which process 0 hosts: no device takes part, so nothing
here waits for a running step or compiles a program.
"""

from collections.abc import Iterator, Mapping
import contextlib
import itertools
import json
import os
import socket
import sys
import threading
from typing import Any
import warnings

import jax

# The store has no public name; Orbax and others reach it the same way.
from jax._src.distributed import global_state

_PATIENCE_SECONDS = 1800  # for the slowest process to reach an exchange
_NOTICE_SECONDS = 20  # of waiting for the others, before it is told
_NUMBERS = itertools.count()

_STEP = "SLURM_STEP_NUM_TASKS"
# How many processes MPI started, and which of them this is.
_MPI = (
  ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),  # Open MPI
  ("PMI_SIZE", "PMI_RANK"),  # MPICH, Intel MPI
)
_BY_HAND = (
  "JAX_COORDINATOR_ADDRESS=HOST:PORT, the host of the first process and a free"
  " port"
)


def called_for(environment: Mapping[str, str]) -> bool:
  """Returns whether these environment variables describe several processes.

  True in a step of Slurm (what `srun` starts) or under MPI with more than one
  task, with an explicit `JAX_COORDINATOR_ADDRESS` and not one process alone, and
  on a TPU pod of more than one host. A batch script of Slurm, and an interactive
  shell in it, have the tasks of the whole job in `SLURM_NTASKS`, and are alone.
  """
  if environment.get("JAX_COORDINATOR_ADDRESS"):
    return environment.get("JAX_NUM_PROCESSES") != "1"
  return (
    _tasks(environment.get(_STEP)) > 1
    or _mpi(environment) is not None
    or _pod(environment)
  )


def _tasks(value: str | None) -> int:
  """Returns a count of tasks, 1 where it is none: "", "2(x3)"."""
  return int(value) if value and value.isascii() and value.isdigit() else 1


def _mpi(environment: Mapping[str, str]) -> tuple[str, str] | None:
  """Returns the names of count and number if MPI started several, else None.

  Where Slurm's step counts the same tasks, `srun` started them, and jax knows
  Slurm. Where it does not, the step is that of MPI's own helpers.
  """
  for names in _MPI:
    count = environment.get(names[0])
    if _tasks(count) > 1 and count != environment.get(_STEP):
      return names
  return None


def _pod(environment: Mapping[str, str]) -> bool:
  """Returns whether this is one of several hosts of TPUs, and is to use them."""
  platforms = environment.get("JAX_PLATFORMS")
  if platforms and "tpu" not in platforms:
    return False
  hosts = environment.get(  # as jax prefers them
    "TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", "")
  )
  slices = environment.get("MEGASCALE_NUM_SLICES")
  return len(hosts.split(",")) > 1 or (
    "MEGASCALE_COORDINATOR_ADDRESS" in environment
    and (slices is None or _tasks(slices) > 1)
  )


def left_behind(environment: Mapping[str, str]) -> str | None:
  """Returns what to type, where a job has more tasks than this process is one of.

  None where nothing is left unused, as far as the environment tells.
  """
  tasks = _tasks(environment.get("SLURM_NTASKS"))
  if tasks > 1 and _tasks(environment.get(_STEP)) == 1:
    return (
      f"Slurm has {tasks} tasks for this job, but this process was not started"
      " by srun and runs alone: type `srun dllm ...` to use them all"
    )
  world = environment.get("WORLD_SIZE")
  if _tasks(world) > 1 and environment.get("RANK"):
    return (
      f"WORLD_SIZE={world} is torchrun's and not read: this process runs alone;"
      f" to make it one of {world} set {_BY_HAND}, JAX_NUM_PROCESSES={world} and"
      f" JAX_PROCESS_ID={environment['RANK']}"
    )
  return None


def initialise() -> None:
  """Joins the other processes of a job; alone it does nothing.

  Call it before anything else touches jax. Coordinator, process count and index
  come from the environment: `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
  `JAX_PROCESS_ID` where given, else what Slurm, MPI or the TPU says.

  Raises:
    ValueError: the environment tells of several processes, but not enough to
      find them.
  """
  environment = os.environ
  if jax.distributed.is_initialized():
    return
  if not called_for(environment):
    if (unused := left_behind(environment)) is not None:
      warnings.warn(unused, stacklevel=2)
    return
  arguments = _arguments(environment)
  notice = threading.Timer(_NOTICE_SECONDS, _tell_of_waiting, [environment])
  notice.daemon = True
  notice.start()
  try:
    jax.distributed.initialize(**arguments)
  except ValueError as error:  # what jax itself looks for is not all there
    raise ValueError(
      f"{_told(environment)} tells of several processes, but not how they find"
      f" each other ({error}): set {_BY_HAND}, JAX_NUM_PROCESSES and"
      " JAX_PROCESS_ID, or unset these variables to run alone"
    ) from error
  finally:
    notice.cancel()


def _told(environment: Mapping[str, str]) -> str:
  """Returns the names of the variables that tell of several processes."""
  known = (
    "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", _STEP, "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_ADDRESSES", "MEGASCALE_COORDINATOR_ADDRESS",
    *(count for count, _ in _MPI),
  )  # fmt: skip
  return ", ".join(name for name in known if environment.get(name))


def _tell_of_waiting(environment: Mapping[str, str]) -> None:
  """Says what this process waits for, which jax gives up after minutes."""
  print(
    f"dllm: still waiting for the other processes that {_told(environment)}"
    " tells of: start them all (`srun dllm ...` under Slurm), or unset these"
    " variables to run alone",
    file=sys.stderr,
    flush=True,
  )


def _arguments(environment: Mapping[str, str]) -> dict[str, Any]:
  """Returns what jax does not find out by itself.

  Raises:
    ValueError: something is missing, or is no number.
  """
  address, mpi = environment.get("JAX_COORDINATOR_ADDRESS"), _mpi(environment)
  step = _tasks(environment.get(_STEP))
  if not address:
    if mpi and "OMPI_MCA_orte_hnp_uri" not in environment:
      raise ValueError(  # Open MPI 5 and MPICH do not set what jax reads.
        "this MPI does not tell its processes where the first one is: set"
        f" {_BY_HAND}"
      )
    # jax takes the job's tasks, which with `srun --preserve-env` are not the
    # step's.
    return {"num_processes": step} if step > 1 and not mpi else {}
  if not address.rpartition(":")[2].isdigit():
    raise ValueError(
      f"JAX_COORDINATOR_ADDRESS must be HOST:PORT, not {address!r}"
    )
  count, number = mpi or ("", "")
  found = {
    "num_processes": _number(environment, "JAX_NUM_PROCESSES", count),
    "process_id": _number(environment, "JAX_PROCESS_ID", number),
  }
  if set(found.values()) == {None} and (step > 1 or _pod(environment)):
    counted = {"num_processes": step} if step > 1 else {}
    return {"coordinator_address": address, **counted}
  if None in found.values():
    raise ValueError(
      "JAX_COORDINATOR_ADDRESS needs both JAX_NUM_PROCESSES and"
      " JAX_PROCESS_ID, or neither under srun or MPI; unset it to run alone"
    )
  if found["process_id"] >= found["num_processes"]:
    raise ValueError(
      "JAX_PROCESS_ID must be below JAX_NUM_PROCESSES, not"
      f" {found['process_id']} of {found['num_processes']}"
    )
  return {"coordinator_address": address, **found}


def _number(environment: Mapping[str, str], *names: str) -> int | None:
  """Returns the first of these variables that is set, None if none is.

  Raises:
    ValueError: it is no number.
  """
  for name in names:
    value = environment.get(name)
    if value:
      if not value.isdigit():
        raise ValueError(f"{name} must be a number, not {value!r}")
      return int(value)
  return None


def store() -> Any | None:
  """Returns the client of the job's key-value store, None for one process."""
  return global_state.client if global_state.num_processes > 1 else None


def index() -> int:
  """Returns the number of this process, without starting a backend."""
  return global_state.process_id


def name(process: int | None = None, host: str | None = None) -> str:
  """Returns what to call a process in a message: this one by default."""
  process = index() if process is None else process
  return f"process {process} ({host or socket.gethostname()})"


def exchange(value: Any) -> list[Any]:
  """Returns the values of all processes, in their order.

  Every process must call it the same number of times; it waits for the slowest.

  Args:
    value: anything that JSON can hold.
  """
  client = store()
  if client is None:
    return [value]
  number, own = next(_NUMBERS), index()
  key = "dllm/exchange/{}/{}".format
  client.key_value_set(key(number, own), json.dumps(value))
  client.wait_at_barrier(key(number, "all"), _PATIENCE_SECONDS * 1000)
  if number:  # Everybody has read the one before.
    client.key_value_delete(key(number - 1, own))
  entries = client.key_value_dir_get(key(number, ""))
  found = {int(k.rsplit("/", 1)[1]): json.loads(v) for k, v in entries}
  return [found[i] for i in range(global_state.num_processes)]


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Either every process gets through the block, or all raise.

  Without it the others would wait in their next collective for one that failed.
  The block itself must not wait for other processes.

  Raises:
    ValueError: another process raised; its message, and which one it was.
  """
  mine = None
  try:
    yield
  except Exception as error:  # pylint: disable=broad-except
    mine = error
  told = None if mine is None else f"{name()}: {mine}"
  failed = [message for message in exchange(told) if message is not None]
  if mine is not None:
    raise mine
  if failed:
    raise ValueError(failed[0])

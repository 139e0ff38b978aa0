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
from typing import Any
import warnings

import jax

# The store has no public name; Orbax and others reach it the same way.
from jax._src.distributed import global_state

_PATIENCE_SECONDS = 1800  # for the slowest process to reach an exchange
_NUMBERS = itertools.count()


def called_for(environment: Mapping[str, str]) -> bool:
  """Returns whether these environment variables describe several processes.

  True in a step of Slurm (what `srun` starts) or under Open MPI with more than
  one task, with an explicit `JAX_COORDINATOR_ADDRESS`, and on a TPU pod of more
  than one host. A batch script of Slurm, and an interactive shell in it, have the
  tasks of the whole job in `SLURM_NTASKS`, and are alone.
  """
  if environment.get("JAX_COORDINATOR_ADDRESS"):
    return True
  slices = environment.get("MEGASCALE_NUM_SLICES")
  hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
  return (
    _tasks(environment.get("SLURM_STEP_NUM_TASKS")) > 1
    or _tasks(environment.get("OMPI_COMM_WORLD_SIZE")) > 1
    or len(hosts.split(",")) > 1
    or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    and (slices is None or _tasks(slices) > 1)
  )


def _tasks(value: str | None) -> int:
  """Returns a count of tasks, 1 where it is none: "", "2(x3)"."""
  return int(value) if value and value.isascii() and value.isdigit() else 1


def left_behind(environment: Mapping[str, str]) -> str | None:
  """Returns what to type, where a job has more tasks than this process is one of.

  None where nothing is left unused, as far as the environment tells.
  """
  tasks = _tasks(environment.get("SLURM_NTASKS"))
  if tasks > 1 and "SLURM_STEP_NUM_TASKS" not in environment:
    return (
      f"Slurm has {tasks} tasks for this job, but this process was not started"
      " by srun and runs alone: type `srun dllm ...` to use them all"
    )
  return None


def initialise() -> None:
  """Joins the other processes of a job; alone it does nothing.

  Call it before anything else touches jax. Coordinator, process count and index
  come from the environment: `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
  `JAX_PROCESS_ID` where given, else what Slurm, Open MPI or the TPU says.

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
  jax.distributed.initialize(**_arguments(environment))


def _arguments(environment: Mapping[str, str]) -> dict[str, Any]:
  """Returns what jax does not find out by itself."""
  address = environment.get("JAX_COORDINATOR_ADDRESS")
  mpi = "OMPI_COMM_WORLD_SIZE" in environment
  if address is None:
    if mpi and "OMPI_MCA_orte_hnp_uri" not in environment:
      raise ValueError(  # Open MPI 5 no longer sets what jax reads.
        "this Open MPI does not tell its processes where the first one is: set"
        " JAX_COORDINATOR_ADDRESS=HOST:PORT, the host of rank 0 and a free port"
      )
    return {}
  names = {
    "num_processes": ("JAX_NUM_PROCESSES", "OMPI_COMM_WORLD_SIZE"),
    "process_id": ("JAX_PROCESS_ID", "OMPI_COMM_WORLD_RANK"),
  }
  found = {}
  for argument, (own, theirs) in names.items():
    value = environment.get(own) or environment.get(theirs)
    if value is not None:
      found[argument] = int(value)
  slurm = "SLURM_STEP_NUM_TASKS" in environment
  if len(found) != 2 and (found or not slurm):
    raise ValueError(
      "JAX_COORDINATOR_ADDRESS needs both JAX_NUM_PROCESSES and"
      " JAX_PROCESS_ID, or neither under srun or Open MPI; unset it to run alone"
    )
  return {"coordinator_address": address, **found}


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

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

import jax

# The store has no public name; Orbax and others reach it the same way.
from jax._src.distributed import global_state

_PATIENCE_SECONDS = 1800  # for the slowest process to reach an exchange
_NUMBERS = itertools.count()


def called_for(environment: Mapping[str, str]) -> bool:
  """Returns whether these environment variables describe several processes.

  True under Slurm or Open MPI with more than one task, with an explicit
  `JAX_COORDINATOR_ADDRESS`, and on a TPU pod of more than one host.
  """
  if environment.get("JAX_COORDINATOR_ADDRESS"):
    return True
  for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
    # An interactive Slurm shell sets SLURM_NTASKS too, but no process id.
    started = name != "SLURM_NTASKS" or "SLURM_PROCID" in environment
    if started and int(environment.get(name) or 1) > 1:
      return True
  hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
  return len(hosts.split(",")) > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in (
    environment
  )


def initialise() -> None:
  """Joins the other processes of a job; alone it does nothing.

  Call it before anything else touches jax. Coordinator, process count and index
  come from the environment: `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
  `JAX_PROCESS_ID` where given, else what Slurm, Open MPI or the TPU says.

  Raises:
    ValueError: if JAX_COORDINATOR_ADDRESS comes without its two companions.
  """
  environment = os.environ
  if not called_for(environment) or jax.distributed.is_initialized():
    return
  arguments = {}
  if environment.get("JAX_COORDINATOR_ADDRESS"):
    names = {
      "num_processes": "JAX_NUM_PROCESSES",
      "process_id": "JAX_PROCESS_ID",
    }
    arguments["coordinator_address"] = environment["JAX_COORDINATOR_ADDRESS"]
    for argument, name in names.items():
      if name in environment:
        arguments[argument] = int(environment[name])
    if len(arguments) == 2:
      raise ValueError(
        "JAX_COORDINATOR_ADDRESS needs both JAX_NUM_PROCESSES and"
        " JAX_PROCESS_ID, or neither under Slurm or Open MPI"
      )
  jax.distributed.initialize(**arguments)


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

"""Start-up of several processes, where the environment describes several."""

from collections.abc import Mapping
import os

import jax


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

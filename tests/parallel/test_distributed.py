"""When several processes are started, and when not."""

import jax
import pytest

from dllm_jax.parallel import distributed

STEP = {
  "SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0",
  "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4",
}  # fmt: skip
# A batch script runs once, on the first node, whatever was asked for.
SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}


@pytest.mark.parametrize("environment, expected", [
    ({}, False),
    ({"JAX_COORDINATOR_ADDRESS": "host:1234"}, True),
    (STEP, True),
    (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, False),  # srun --pty -n1 bash
    (SCRIPT, False),
    ({"SLURM_NTASKS": "4"}, False),  # salloc
    ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
    ({"SLURM_NTASKS": "2(x3)", "SLURM_STEP_NUM_TASKS": ""}, False),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
    ({"RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "x"}, False),  # torchrun
    ({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "1"}, False),
    ({"TPU_WORKER_HOSTNAMES": ""}, False),
    ({"TPU_WORKER_HOSTNAMES": "a"}, False),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, True),
    ({"MEGASCALE_COORDINATOR_ADDRESS": "a", "MEGASCALE_NUM_SLICES": "1"}, False),
], ids=str)  # fmt: skip
def test_called_for(environment, expected):
  assert distributed.called_for(environment) is expected


@pytest.fixture
def environment(monkeypatch):
  """Returns a function that sets the environment, and what jax is told."""
  calls = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda **kwargs: calls.append(kwargs)
  )

  def set_to(**values):
    monkeypatch.setattr(distributed.os, "environ", values)
    return calls

  return set_to


def test_alone_in_a_job_of_several_runs_alone_and_says_so(environment):
  calls = environment(**SCRIPT)
  with pytest.warns(UserWarning, match="has 4 tasks .* type `srun dllm"):
    distributed.initialise()
  assert not calls
  assert environment(**STEP) is calls
  distributed.initialise()
  assert calls == [{}]  # jax reads the rest itself


def test_what_jax_does_not_find_is_passed_or_asked_for(environment):
  mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
  calls = environment(**mpi)  # Open MPI 5 sets no OMPI_MCA_orte_hnp_uri
  with pytest.raises(ValueError, match="set JAX_COORDINATOR_ADDRESS=HOST:PORT"):
    distributed.initialise()
  environment(**mpi, JAX_COORDINATOR_ADDRESS="host:1")
  distributed.initialise()
  environment(**mpi, OMPI_MCA_orte_hnp_uri="0.0;tcp://10.0.0.1:1")
  distributed.initialise()
  given = {"coordinator_address": "host:1", "num_processes": 2, "process_id": 1}
  assert calls == [given, {}]
  environment(JAX_COORDINATOR_ADDRESS="host:1")
  with pytest.raises(ValueError, match="unset it to run alone"):
    distributed.initialise()


def test_initialise_passes_what_the_environment_says(monkeypatch):
  calls = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda **kwargs: calls.append(kwargs)
  )
  for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"):
    monkeypatch.delenv(name, raising=False)
  distributed.initialise()
  assert not calls
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  with pytest.raises(ValueError, match="needs both"):
    distributed.initialise()
  monkeypatch.setenv("JAX_PROCESS_ID", "1")
  distributed.initialise()
  assert calls == [
    {"coordinator_address": "host:1", "num_processes": 2, "process_id": 1}
  ]

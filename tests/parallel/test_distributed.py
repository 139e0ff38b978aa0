"""When several processes are started, and when not."""

import jax
import pytest

from dllm_jax.parallel import distributed


@pytest.mark.parametrize("environment, expected", [
    ({}, False),
    ({"JAX_COORDINATOR_ADDRESS": "host:1234"}, True),
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, True),
    ({"SLURM_NTASKS": "4"}, False),
    ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"TPU_WORKER_HOSTNAMES": "a"}, False),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
], ids=str)  # fmt: skip
def test_called_for(environment, expected):
  assert distributed.called_for(environment) is expected


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

"""When several processes are started, and when not."""

import time

import jax
import pytest

from dllm_jax.parallel import distributed

# Slurm's manual, srun(1), "OUTPUT ENVIRONMENT VARIABLES": a step, what srun
# starts, has SLURM_STEP_NUM_TASKS; sbatch(1) and salloc(1) set SLURM_NTASKS alone.
STEP = {
  "SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0",
  "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4",
}  # fmt: skip
# A batch script runs once, on the first node, whatever was asked for.
SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
# salloc with LaunchParameters=use_interactive_step: srun --interactive
# --preserve-env --pty, one task that keeps the job's SLURM_NTASKS.
SHELL = STEP | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
# MPICH's hydra, and Intel's.
HYDRA = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1"}
# https://docs.pytorch.org/docs/stable/elastic/run.html, and what Kubeflow's
# PyTorchJob sets in every pod.
TORCHRUN = {
  "RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "x", "MASTER_PORT": "29500",
}  # fmt: skip
# jax's cloud_tpu_cluster.py (0.10.2), GkeTpuCluster.
PODS = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}
MEGASCALE = {"MEGASCALE_COORDINATOR_ADDRESS": "a"}
BY_HAND = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_PROCESS_ID": "0"}


@pytest.mark.parametrize("environment, expected", [
    ({}, False),
    ({"JAX_COORDINATOR_ADDRESS": "host:1234"}, True),
    ({"JAX_COORDINATOR_ADDRESS": ""}, False),
    (BY_HAND | {"JAX_NUM_PROCESSES": "2"}, True),
    (BY_HAND | {"JAX_NUM_PROCESSES": "1"}, False),
    (STEP, True),
    (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, False),  # srun --pty -n1 bash
    (SHELL, False),
    (SCRIPT, False),
    ({"SLURM_NTASKS": "4"}, False),  # salloc
    ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
    ({"SLURM_NTASKS": "2(x3)", "SLURM_STEP_NUM_TASKS": ""}, False),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
    (HYDRA, True),
    (HYDRA | {"PMI_SIZE": "1"}, False),
    (SCRIPT | {"PMI_SIZE": "1", "PMI_RANK": "0"}, False),
    (TORCHRUN, False),
    ({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "1"}, False),
    ({"CLOUD_TPU_TASK_ID": "3"}, False),
    ({"TPU_WORKER_HOSTNAMES": ""}, False),
    ({"TPU_WORKER_HOSTNAMES": "a"}, False),
    (PODS, True),
    (PODS | {"TPU_PROCESS_ADDRESSES": "localhost:8476"}, False),
    (PODS | {"JAX_PLATFORMS": "cpu"}, False),
    (PODS | {"JAX_PLATFORMS": "tpu,cpu"}, True),
    (MEGASCALE, True),
    (MEGASCALE | {"MEGASCALE_NUM_SLICES": "1"}, False),
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


@pytest.mark.parametrize(("given", "words"), [
    (SCRIPT, "has 4 tasks .* type `srun dllm"),
    (SHELL, "has 4 tasks .* type `srun dllm"),
    (TORCHRUN, "runs alone; .*=HOST:PORT, .*=8 and JAX_PROCESS_ID=3"),
])  # fmt: skip
def test_alone_in_a_job_of_several_runs_alone_and_says_so(
  environment, given, words
):
  calls = environment(**given)
  with pytest.warns(UserWarning, match=words):
    distributed.initialise()
  assert not calls


@pytest.mark.parametrize("given", [
    STEP | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},  # srun -n1 dllm
    {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x"},
    {"JOB_COMPLETION_INDEX": "1"},
    PODS | {"JAX_PLATFORMS": "cpu"},
], ids=str)  # fmt: skip
def test_alone_with_nothing_left_unused_says_nothing(environment, given):
  calls = environment(**given)
  distributed.initialise()  # a warning would be an error here
  assert not calls


HOST = {"JAX_COORDINATOR_ADDRESS": "host:1"}
OMPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
URI = {"OMPI_MCA_orte_hnp_uri": "0.0;tcp://10.0.0.1:1"}
SECOND = {"coordinator_address": "host:1", "num_processes": 2, "process_id": 1}


@pytest.mark.parametrize(("given", "told"), [
    (STEP, {"num_processes": 4}),
    # srun --preserve-env -n 2 in a job of 4: jax reads SLURM_NTASKS.
    (STEP | {"SLURM_STEP_NUM_TASKS": "2"}, {"num_processes": 2}),
    (STEP | HOST, {"coordinator_address": "host:1", "num_processes": 4}),
    (STEP | {"PMI_SIZE": "4", "PMI_RANK": "0"}, {"num_processes": 4}),  # pmi2
    (OMPI | URI, {}),
    (OMPI | HOST, SECOND),
    (HYDRA | HOST, SECOND),
    (HOST | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, SECOND),
    # Hydra's own helpers are a step of one task a node, its processes more.
    (STEP | HYDRA | HOST, SECOND),
    (PODS, {}),
    (PODS | HOST, {"coordinator_address": "host:1"}),
], ids=str)  # fmt: skip
def test_jax_is_told_what_it_does_not_find(environment, given, told):
  calls = environment(**given)
  distributed.initialise()
  assert calls == [told]


@pytest.mark.parametrize(("given", "words"), [
    (OMPI, "set JAX_COORDINATOR_ADDRESS=HOST:PORT"),  # Open MPI 5
    (HYDRA, "set JAX_COORDINATOR_ADDRESS=HOST:PORT"),
    (HOST, "unset it to run alone"),
    (HOST | {"JAX_NUM_PROCESSES": "2"}, "needs both"),
    (BY_HAND | {"JAX_NUM_PROCESSES": "two"}, "must be a number, not 'two'"),
    (BY_HAND | {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "not 2 of 2"),
    (OMPI | {"JAX_COORDINATOR_ADDRESS": "host"}, "HOST:PORT, not 'host'"),
])  # fmt: skip
def test_what_is_missing_is_asked_for(environment, given, words):
  calls = environment(**given)
  with pytest.raises(ValueError, match=words):
    distributed.initialise()
  assert not calls


def test_a_cluster_that_jax_does_not_find_is_named(monkeypatch):
  """jax itself: a step of Slurm without its list of nodes, as in a container."""
  monkeypatch.setattr(distributed.os, "environ", STEP)
  bare = type(distributed.global_state)()
  monkeypatch.setattr(jax.distributed, "initialize", bare.initialize)
  with pytest.raises(
    ValueError, match="SLURM_STEP_NUM_TASKS tells of .* unset"
  ):
    distributed.initialise()


def test_processes_that_do_not_come_are_told_of(
  environment, monkeypatch, capfd
):
  environment(**STEP)
  monkeypatch.setattr(distributed, "_NOTICE_SECONDS", 0.01)
  wait = lambda **kwargs: time.sleep(0.2)
  monkeypatch.setattr(jax.distributed, "initialize", wait)
  distributed.initialise()
  (line,) = capfd.readouterr().err.splitlines()
  assert "waiting" in line and "SLURM_STEP_NUM_TASKS" in line

"""Tiny runs and their subprocesses, for tests of whole commands."""

import math
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np

from dllm_jax import config
from dllm_jax.run import Run

ROOT = pathlib.Path(__file__).parent.parent


def tiny(**fields):
  """Returns a resolved configuration that trains in a second.

  Fields are given as `section__field=value`.
  """
  given = {
    "data": {"path": "shakespeare", "tokenizer": "char", "length": 32},
    "model": {"width": 16, "layers": 2, "heads": 2},
    # Constant, so that a run of fewer steps is the beginning of a longer one.
    "optimizer": {
      "learning_rate": 1e-2,
      "warmup_steps": 2,
      "schedule": "constant",
    },
    "training": {"steps": 6, "batch_size": 8},
    "checkpoint": {"every_steps": 3},
    "logging": {"every_steps": 1, "tensorboard": False, "progress": False},
    "evaluation": {"batch_size": 8, "batches": 2, "passes": 2},
    "mesh": {"data": 1},
  }
  for name, value in fields.items():
    section, field = name.split("__")
    given.setdefault(section, {})[field] = value
  return config.resolve(given)


def run(workdir, **fields) -> Run:
  """Returns a tiny run on as many devices as its mesh names: one by default."""
  resolved = tiny(**fields)
  count = math.prod(resolved.mesh.to_dict().values())
  return Run.create(resolved, workdir, devices=jax.devices()[:count])


def parameters(state) -> list[np.ndarray]:
  """Returns the parameters of a state on the host, in one order."""
  return [np.asarray(x) for x in jax.tree.leaves(jax.device_get(state.params))]


def dllm(*args, devices: int = 1, **kwargs) -> subprocess.Popen:
  """Starts `dllm ARGS` in a process of its own, with simulated devices."""
  flag = f"--xla_force_host_platform_device_count={devices}"
  return subprocess.Popen(
    [sys.executable, "-m", "dllm_jax", *map(str, args)],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": flag},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **kwargs,
  )


def free_port() -> int:
  """Returns a port of this machine that nothing listens on."""
  with socket.socket() as found:
    found.bind(("localhost", 0))
    return found.getsockname()[1]

"""Tiny runs and their subprocesses, for tests of whole commands."""

import json
import math
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np

from dllm_jax.config import config
from dllm_jax.run.run import Run
from dllm_jax.training.checkpoint import Checkpoints  # noqa: F401

ROOT = pathlib.Path(__file__).parent.parent


# Of a flag that is given twice, the last counts.
_COUNT = "--xla_force_host_platform_device_count"


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
    "training": {"steps": 6, "batch_size": 8, "ema_decay": 0.5},
    "checkpoint": {"every_steps": 3},
    "logging": {"every_steps": 1, "tensorboard": False, "progress": False},
    "evaluation": {"batch_size": 8, "batches": 2, "passes": 2},
    "mesh": {"data": 1},
  }
  for name, value in fields.items():
    section, field = name.split("__")
    given.setdefault(section, {})[field] = value
  return config.resolve(given)


def often_saved(workdir, **fields) -> list[str]:
  """Returns arguments of `dllm` for a small run that saves every fourth step.

  Fields are given as `section__field=value`.
  """
  given = {
    "data__length": 32,
    "model__width": 16,
    "checkpoint__every_steps": 4,
    "logging__every_steps": 1,
    "logging__tensorboard": "false",
    "logging__progress": "false",
    "evaluation__batches": 1,
    "optimizer__schedule": "constant",
  } | fields
  overrides = [f"--config.{k.replace('__', '.')}={v}" for k, v in given.items()]
  return ["train", "--config=smoke", f"--workdir={workdir}", *overrides]


def run(workdir, **fields) -> Run:
  """Returns a tiny run on as many devices as its mesh names: one by default."""
  resolved = tiny(**fields)
  count = math.prod(resolved.mesh.to_dict().values())
  return Run.create(resolved, workdir, devices=jax.devices()[:count])


def parameters(state) -> list[np.ndarray]:
  """Returns the parameters of a state on the host, in one order."""
  return [np.asarray(x) for x in jax.tree.leaves(jax.device_get(state.params))]


def dllm(
  *args, devices: int = 1, program=("-m", "dllm_jax"), **kwargs
) -> subprocess.Popen:
  """Starts `dllm ARGS` in a process of its own, with simulated devices.

  Args:
    *args: the arguments.
    devices: simulated devices.
    program: Python's own arguments, for a `dllm` in which something was changed.
    **kwargs: for `subprocess.Popen`.
  """
  flags = f"{os.environ['XLA_FLAGS']} {_COUNT}={devices}"
  return subprocess.Popen(
    [sys.executable, *program, *map(str, args)],
    cwd=ROOT,
    env=os.environ | {"XLA_FLAGS": flags},
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


def job(
  workdir, resolved, *options, processes: int = 2, devices: int = 1, at=None
):
  """Starts `dllm train` in several processes by launch/local.py.

  Args:
    workdir: the run's directory; beside it lies the configuration's file.
    resolved: the configuration.
    *options: of the launcher.
    processes: how many.
    devices: simulated devices of each.
    at: where the run is instead, such as in a bucket.

  Returns:
    The launcher's process, and a function to the ids of the running processes.
  """
  file = workdir.parent / f"{workdir.name}.py"
  file.write_text(
    "from ml_collections import ConfigDict\n"
    f"def get_config(): return ConfigDict({resolved.to_dict()!r})\n"
  )
  log = workdir.parent / f"{workdir.name}.log"
  launcher = subprocess.Popen(
    [
      *(sys.executable, ROOT / "launch" / "local.py"),
      *(f"--processes={processes}", f"--devices={devices}", *options),
      *("--", "train", f"--config={file}", f"--workdir={at or workdir}"),
    ],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=log.open("w"),
    text=True,
  )

  def running() -> list[int]:
    lines = re.findall(r"attempt \d+, processes ([\d ]+)", log.read_text())
    return [int(number) for number in lines[-1].split()] if lines else []

  return launcher, running


def steps_logged(workdir) -> int:
  """Returns the newest step that a run has logged."""
  path = workdir / "metrics.jsonl"
  lines = path.read_text().split("\n")[:-1] if path.exists() else []
  return json.loads(lines[-1])["step"] if lines else 0

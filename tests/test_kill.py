"""Runs that are killed at random steps end as if they had not been."""

import json
import random
import signal
import time

import jax
import numpy as np
import pytest

from tests import runs

STEPS = 60


def _args(workdir, **fields):
  return runs.often_saved(workdir, **({"training__steps": STEPS} | fields))


def _step(workdir) -> int:
  path = workdir / "metrics.jsonl"
  if not path.exists():
    return 0
  lines = path.read_text().split("\n")[:-1]
  return json.loads(lines[-1])["step"] if lines else 0


def _finish(args, **kwargs):
  process = runs.dllm(*args, **kwargs)
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  return json.loads(out.splitlines()[-1])


def _kill(args, workdir, step, *, saving=False):
  """Starts a run and kills it once it has logged a step, or saves after it."""
  process = runs.dllm(*args)
  while _step(workdir) < step and process.poll() is None:
    time.sleep(0.002)
  while saving and process.poll() is None:
    if list(workdir.glob("checkpoints/*tmp*")):
      break
  process.send_signal(signal.SIGKILL)
  process.communicate()


def _parameters(workdir):
  run = runs.Run.open(workdir, devices=jax.devices()[:1])
  assert int(run.state.step) == STEPS
  return runs.parameters(run.state)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("whole") / "run"
  _finish(_args(workdir))
  return _parameters(workdir)


def _killed_run(workdir, kills, seed):
  rng = random.Random(seed)
  for i, step in enumerate(sorted(rng.sample(range(1, STEPS), kills))):
    _kill(_args(workdir), workdir, step, saving=i % 2 == 0)
  assert _finish(_args(workdir))["step"] == STEPS
  return _parameters(workdir)


# One is killed while it saves, the others between saves too.
@pytest.mark.all
@pytest.mark.parametrize("kills", [1, 3])
def test_kills_change_nothing(whole, tmp_path, kills):
  killed = _killed_run(tmp_path / "run", kills, 0)
  for a, b in zip(killed, whole, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.all
def test_kill_and_restart_on_another_mesh(whole, tmp_path):
  workdir = tmp_path / "run"
  _kill(_args(workdir), workdir, 50)
  other = {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
  _finish(_args(workdir, **other), devices=8)
  # Other orders of summation, enlarged by the optimiser over a few steps.
  for a, b in zip(_parameters(workdir), whole, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.all
def test_twenty_kills_change_nothing(whole, tmp_path):
  for seed in range(4):
    workdir = tmp_path / str(seed)
    for a, b in zip(_killed_run(workdir, 5, seed + 1), whole, strict=True):
      np.testing.assert_array_equal(a, b)


@pytest.mark.all
def test_sigterm_saves_and_exits_0(tmp_path):
  workdir = tmp_path / "run"
  args = _args(workdir, training__steps=100_000)
  process = runs.dllm(*args)
  while _step(workdir) < 5 and process.poll() is None:
    time.sleep(0.002)
  process.send_signal(signal.SIGTERM)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err
  result = json.loads(out.splitlines()[-1])
  assert result["interrupted"]
  run = runs.Run.open(workdir, devices=jax.devices()[:1])
  assert int(run.state.step) == result["step"]

"""Jobs of several processes: the same run as in one, whatever befalls them."""

import json
import os
import random
import signal
import time

import jax
import numpy as np
import pytest

from dllm_jax import data
from tests import runs


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
  """Fields of a run whose text is packed on the fly: each process has a part."""
  path = tmp_path_factory.mktemp("text") / "rows.jsonl"
  rows = (json.dumps({"text": f"{i} " * (5 + i % 7)}) for i in range(400))
  path.write_text("\n".join(rows))
  return {
    "data__path": str(path),
    "data__tokenizer": "byte",
    "data__packing": "packed",
    "data__in_memory_bytes": 0,
    "data__virtual_shards": 8,
    "optimizer__learning_rate": 1e-3,
  }


def _losses(workdir):
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  name = "loss_nats_per_token"
  return {line["step"]: line[name] for line in lines if name in line}


def _wait(workdir, launcher, step, seconds=600):
  limit = time.monotonic() + seconds
  while runs.steps_logged(workdir) < step and launcher.poll() is None:
    assert time.monotonic() < limit
    time.sleep(0.01)


def _same(left, right):
  for a, b in zip(left, right, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.all
def test_two_processes_are_one_run(streamed, tmp_path):
  """Two processes of 4 devices, one told to stop, then one process of 8."""
  fields = streamed | {"mesh__data": 8}
  endless = runs.tiny(training__steps=100_000, **fields)
  workdir = tmp_path / "run"
  launcher, running = runs.job(workdir, endless, devices=4)
  _wait(workdir, launcher, 6)
  os.kill(running()[1], signal.SIGTERM)  # not the one that coordinates
  out, _ = launcher.communicate(timeout=600)
  assert launcher.returncode == 0, (tmp_path / "run.log").read_text()
  result = json.loads(out.splitlines()[-1])
  assert result["interrupted"]
  stopped = result["step"]
  assert out.count("interrupted") == 1, "only the first process prints"

  whole = runs.run(tmp_path / "whole", training__steps=stopped + 2, **fields)
  whole.train()
  expected = _losses(tmp_path / "whole")
  got = _losses(workdir)
  assert sorted(got) == list(range(1, stopped + 1))
  for step in range(1, 7):
    np.testing.assert_allclose(got[step], expected[step], rtol=1e-5)

  # One process reads what two saved, and goes on with it in the same order.
  run = runs.run(workdir, training__steps=stopped + 2, **fields)
  assert int(run.state.step) == stopped
  assert run.evaluate(limit=1)["tokens"] > 0
  with (
    jax.set_mesh(run.mesh),
    runs.Checkpoints(workdir, writes=False) as checkpoints,
  ):
    _, data_state = run.program.restore(checkpoints)
  batches = data.train_iterator(run.corpus, batch_size=8, seed=0)
  for _ in range(stopped):
    next(batches)
  assert json.loads(json.dumps(data_state)) == json.loads(
    json.dumps(batches.get_state())
  )
  batches.close()
  run.train()
  for a, b in zip(
    runs.parameters(run.state), runs.parameters(whole.state), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def pair(streamed, tmp_path_factory):
  """The configuration and parameters of an undisturbed run of two processes."""
  fields = streamed | {
    "mesh__data": 2,
    "training__steps": 40,
    "training__heartbeat_seconds": 20.0,
    "checkpoint__every_steps": 2,
    "evaluation__batches": 1,
  }
  resolved = runs.tiny(**fields)
  workdir = tmp_path_factory.mktemp("pair") / "run"
  launcher, _ = runs.job(workdir, resolved)
  launcher.communicate(timeout=900)
  assert launcher.returncode == 0
  return resolved, fields, _parameters(workdir)


def _parameters(workdir):
  state = runs.Run.open(workdir, devices=jax.devices()[:1]).state
  assert int(state.step) == 40
  return runs.parameters(state)


@pytest.mark.all
def test_twenty_kills_of_one_or_both(pair, tmp_path):
  """At random steps, and every other time while a save is under way."""
  resolved, _, whole = pair
  rng, workdir = random.Random(0), tmp_path / "run"
  launcher, running = runs.job(
    workdir, resolved, "--restarts=25", "--grace=0.5"
  )
  kills = 0
  for number, step in enumerate(sorted(rng.choices(range(1, 39), k=20))):
    before = running()
    _wait(workdir, launcher, step)
    while number % 2 and not list(workdir.glob("checkpoints/*tmp*")):
      if launcher.poll() is not None:
        break
      time.sleep(0.001)
    if launcher.poll() is not None:
      break
    victims = running() if rng.random() < 0.5 else [rng.choice(running())]
    for pid in victims:
      os.kill(pid, signal.SIGKILL)
    kills += 1
    limit = time.monotonic() + 120
    before = victims
    while set(before) & set(running()) and time.monotonic() < limit:
      time.sleep(0.02)
  launcher.communicate(timeout=900)
  assert launcher.returncode == 0, (tmp_path / "run.log").read_text()[-2000:]
  assert kills == 20
  _same(_parameters(workdir), whole)


@pytest.mark.all
def test_a_stopped_process_is_noticed_and_the_job_started_again(pair, tmp_path):
  resolved, _, whole = pair
  workdir = tmp_path / "run"
  for who in (1, 0):
    launcher, running = runs.job(workdir, resolved, "--restarts=1")
    _wait(workdir, launcher, 6 if who else 20)
    victim, start = running()[who], time.monotonic()
    os.kill(victim, signal.SIGSTOP)
    while running()[who] == victim and time.monotonic() < start + 200:
      time.sleep(0.1)
    assert time.monotonic() - start < 90
    if who:
      launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=900)
    log = (tmp_path / "run.log").read_text()
    words = "has not been heard of" if who else "which coordinates, has not"
    assert f"dllm: process {who}" in log and words in log, log[-3000:]
  _same(_parameters(workdir), whole)


@pytest.mark.all
def test_two_processes_pass_over_a_damaged_checkpoint(pair, tmp_path):
  resolved, fields, whole = pair
  workdir = tmp_path / "run"
  runs.run(workdir, **(fields | {"training__steps": 7})).train()
  for path in (workdir / "checkpoints" / "7" / "state").rglob("*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  launcher, _ = runs.job(workdir, resolved, "--restarts=0")
  launcher.communicate(timeout=900)
  log = (tmp_path / "run.log").read_text()
  assert launcher.returncode == 0, log[-3000:]
  assert "checkpoint 7" in log and "is skipped" in log
  for a, b in zip(_parameters(workdir), whole, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  run = runs.Run.open(workdir, devices=jax.devices()[:1])
  assert len(run.sample(num_samples=2).texts) == 2

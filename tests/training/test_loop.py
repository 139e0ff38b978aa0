"""The loop: resuming, stopping, and what is left when something goes wrong."""

import dataclasses
import json
import os
import signal
import threading

import jax
import numpy as np
import pytest

from dllm_jax.training.loop import Hooks
from dllm_jax.training.step_log import NonFiniteLossError
from tests import runs


def _steps(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["step"] for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """The parameters of an undisturbed run."""
  run = runs.run(tmp_path_factory.mktemp("whole") / "run")
  summary = run.train()
  assert summary["step"] == 6 and not summary["interrupted"]
  return runs.parameters(run.state)


def test_resumed_run_is_bit_identical(whole, tmp_path):
  first = runs.run(tmp_path / "run", training__steps=4)
  first.train()
  second = runs.run(tmp_path / "run", training__steps=6)
  assert second.train()["step"] == 6
  for a, b in zip(runs.parameters(second.state), whole, strict=True):
    np.testing.assert_array_equal(a, b)
  # Each step is logged once, the last one's evaluation after it.
  assert _steps(tmp_path / "run")[:4] == [1, 2, 3, 4]


@pytest.mark.all
def test_resume_on_another_mesh(whole, tmp_path):
  runs.run(tmp_path / "run", training__steps=3).train()
  second = runs.run(
    tmp_path / "run", mesh__data=2, mesh__fsdp=2, mesh__tensor=2
  )
  second.train()
  # Sums run in another order; a few Adam steps at learning rate 1e-2 enlarge
  # the last bit of a gradient to at most about 1e-5 of a parameter.
  for a, b in zip(runs.parameters(second.state), whole, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_sigterm_finishes_the_step_and_saves(tmp_path):
  run = runs.run(tmp_path / "run", training__steps=500)
  evaluated = []

  def stop(state):
    evaluated.append(int(state.step))
    os.kill(os.getpid(), signal.SIGTERM)
    return {}

  assert threading.current_thread() is threading.main_thread()
  with jax.set_mesh(run.mesh):
    loop = run.loop(run.workdir, Hooks(evaluate=stop, evaluate_every=2))
    state, summary = loop.run()
  assert evaluated == [2]
  assert summary["interrupted"] and summary["step"] == int(state.step) == 2
  assert int(run.state.step) == 2  # on disk


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(tmp_path):
  run = runs.run(
    tmp_path / "run", training__steps=50, checkpoint__every_steps=1
  )
  step, taken = run.program.step, []

  def overflows(state, batch):
    """After a few steps, as under too large a learning rate."""
    taken.append(1)
    state, metrics = step(state, batch)
    if len(taken) < 4:
      return state, metrics
    nan = lambda tree: jax.tree.map(lambda x: x * np.nan, tree)
    metrics |= {"loss_nats_per_token": metrics["loss_nats_per_token"] * np.nan}
    return state.replace(params=nan(state.params)), metrics

  run.__dict__["program"] = dataclasses.replace(run.program, step=overflows)
  with pytest.raises(NonFiniteLossError, match=r"at step \d+ .*learning_rate"):
    run.train()
  assert int(run.state.step) == 3
  for leaf in runs.parameters(run.state):
    assert np.isfinite(leaf).all()


def test_metrics_are_read_one_step_late(tmp_path, monkeypatch):
  """When step k + 1 is dispatched, step k has not been waited for yet."""
  from dllm_jax.training import loop as module

  run = runs.run(tmp_path / "run", checkpoint__every_steps=100)
  events = []
  step, get = run.program.step, jax.device_get
  program = dataclasses.replace(
    run.program, step=lambda *a: (events.append("step"), step(*a))[1]
  )
  monkeypatch.setattr(
    module.jax, "device_get", lambda x: (events.append("read"), get(x))[1]
  )
  run.__dict__["program"] = program
  with jax.set_mesh(run.mesh):
    run.loop(run.workdir, Hooks()).run()
  assert events[:6] == ["step", "step", "read", "step", "read", "step"]


@pytest.mark.all
def test_text_packed_on_the_fly_resumes_where_it_stood(tmp_path):
  """The state of a stream (strings and nested shards) is saved with the rest."""
  rows = [
    json.dumps({"text": f"document {i} " * (5 + i % 7)}) for i in range(400)
  ]
  (tmp_path / "rows.jsonl").write_text("\n".join(rows))
  fields = {
    "data__path": str(tmp_path / "rows.jsonl"),
    "data__tokenizer": "byte",
    "data__packing": "packed",
    "data__in_memory_bytes": 0,
    "data__virtual_shards": 4,
  }
  whole = runs.run(tmp_path / "whole", **fields)
  whole.train()
  runs.run(tmp_path / "run", training__steps=4, **fields).train()
  resumed = runs.run(tmp_path / "run", **fields)
  resumed.train()
  for a, b in zip(
    runs.parameters(resumed.state), runs.parameters(whole.state), strict=True
  ):
    np.testing.assert_array_equal(a, b)

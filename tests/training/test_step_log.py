"""What a run tells of its speed, against a clock that the test sets."""

import gzip
import io
import json

import jax
import pytest
from tqdm import tqdm

from dllm_jax.training import step_log
from dllm_jax.training.metrics import Logging, MetricWriter
from dllm_jax.training.step import Training
from tests import runs

_METRICS = {
  "loss_nats_per_token": 1.0,
  "bound_nats_per_token": 1.0,
  "gradient_norm": 1.0,
  "tokens": 100.0,
}


class _Clock:
  now = 0.0

  def perf_counter(self):
    return self.now


@pytest.fixture
def clock(monkeypatch):
  clock = _Clock()
  monkeypatch.setattr(step_log, "time", clock)
  monkeypatch.setattr(step_log, "peak_flops", lambda kind: 1e6)
  return clock


def _start(clock, workdir, step: int = 0):
  writer = MetricWriter(workdir, Logging(tensorboard=False), resumed_step=step)
  return step_log.StepLog(
    writer=writer,
    bar=tqdm(file=io.StringIO()),
    due=lambda step: True,
    learning_rate=lambda step: 0.0,
    devices=jax.devices()[:2],
    model_flops=lambda: 1_000_000,
  )


def _step(clock, log, step: int, seconds: float):
  clock.now += seconds
  log.push(step, dict(_METRICS))
  log.flush()


def test_speeds(clock, tmp_path):
  log = _start(clock, tmp_path)
  _step(clock, log, 1, 10.0)  # compilation
  _step(clock, log, 2, 2.0)
  with log.paused():
    clock.now += 5.0
  _step(clock, log, 3, 2.0)
  _step(clock, log, 4, 6.0)
  assert log.summary["tokens_per_second"] == pytest.approx(300 / 10)
  assert log.summary["tokens_per_second_per_device"] == pytest.approx(15)
  assert log.summary["step_milliseconds_p50"] == pytest.approx(2000)
  assert log.summary["step_milliseconds_p90"] == pytest.approx(5200)
  # 1e6 FLOPs in 2 s on two devices that could do 1e6 a second each.
  assert log.summary["mfu"] == pytest.approx(0.25)
  assert log.summary["goodput"] == pytest.approx(4 * 2 / 25)
  assert log.summary["peak_bytes"] > 1e6


def test_goodput_counts_what_a_failure_lost(clock, tmp_path):
  log = _start(clock, tmp_path)
  for step in range(1, 7):  # killed after step 6, saved after step 4
    _step(clock, log, step, 2.0)
  log.writer.close()
  clock.now += 100.0  # nothing runs
  log = _start(clock, tmp_path, step=4)
  for step in (5, 6):
    _step(clock, log, step, 2.0)
  # Six steps are kept; eight were done.
  assert log.summary["goodput"] == pytest.approx(6 / 8)
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.all
def test_profile_opens_in_perfetto(tmp_path):
  run = runs.run(tmp_path / "run", training__profile_steps="2:3")
  run.train()
  (trace,) = (tmp_path / "run" / "profile").rglob("perfetto_trace.json.gz")
  events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
  assert len(events) > 10


@pytest.mark.parametrize("steps", ["3", "3:", "4:3", "0:2", "a:b"])
def test_profile_steps_are_checked(steps):
  with pytest.raises(ValueError, match="10:15"):
    Training(profile_steps=steps)

"""Checkpoints that were damaged, and metrics files that were cut short."""

import logging

import numpy as np
import pytest

from dllm_jax.training.metrics import Logging, MetricWriter
from tests import runs


def _damage(directory):
  """Cuts the largest file of a checkpoint in half, as a kill might."""
  files = [f for f in (directory / "state").rglob("*") if f.is_file()]
  largest = max(files, key=lambda f: f.stat().st_size)
  largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def test_a_damaged_newest_checkpoint_falls_back_loudly(tmp_path, caplog):
  run = runs.run(tmp_path / "run")
  run.train()
  expected = runs.parameters(run.state)
  _damage(tmp_path / "run" / "checkpoints" / "6")
  again = runs.run(tmp_path / "run")
  with caplog.at_level(logging.WARNING, logger="dllm_jax"):
    summary = again.train()
  assert "checkpoint 6" in caplog.text and "skipped" in caplog.text
  assert summary["step"] == 6
  for a, b in zip(runs.parameters(again.state), expected, strict=True):
    np.testing.assert_array_equal(a, b)


def test_no_readable_checkpoint_is_an_error(tmp_path):
  run = runs.run(tmp_path / "run")
  run.train()
  for step in ("3", "6"):
    _damage(tmp_path / "run" / "checkpoints" / step)
  with pytest.raises(ValueError, match=r"no checkpoint .* .steps 3, 6"):
    runs.run(tmp_path / "run").train()


def test_only_the_newest_are_kept(tmp_path):
  runs.run(tmp_path / "run", checkpoint__every_steps=1).train()
  left = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
  assert left == ["5", "6"]


def test_metrics_of_repeated_steps_are_dropped(tmp_path):
  with (tmp_path / "metrics.jsonl").open("w") as f:
    f.write('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a"')
  writer = MetricWriter(tmp_path, Logging(tensorboard=False), resumed_step=1)
  writer.write(2, {"a": np.float32(5)})
  writer.close()
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  assert lines == ['{"step": 1, "a": 1}', '{"step": 2, "a": 5.0}']


def test_wandb_that_is_missing_is_named(tmp_path):
  with pytest.raises(ValueError, match="pip install wandb"):
    MetricWriter(tmp_path, Logging(tensorboard=False, wandb="project"))

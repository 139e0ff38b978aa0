"""Checkpoints that were damaged, and metrics files that were cut short."""

import logging
import shutil
import time

import jax
import numpy as np
import pytest

from dllm_jax.training.checkpoint import Checkpoints
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
  # What is on disk now, after the damaged one was moved away.
  on_disk = runs.Run.open(tmp_path / "run", devices=jax.devices()[:1]).state
  assert int(on_disk.step) == 6
  for a, b in zip(runs.parameters(on_disk), expected, strict=True):
    np.testing.assert_array_equal(a, b)
  assert [p.name for p in (tmp_path / "run/unreadable").iterdir()] == ["6-0"]


def _remove_metadata(directory):
  (directory / "_CHECKPOINT_METADATA").unlink()
  (directory / "state" / "_METADATA").unlink()


def _empty(directory):
  shutil.rmtree(directory)
  directory.mkdir()


def _cut_all(directory):
  for path in directory.rglob("*"):
    if path.is_file():
      path.write_bytes(b"")


def _lose_the_data_state(directory):
  shutil.rmtree(directory / "data")


@pytest.mark.all
def test_every_kind_of_damage_is_passed_over(tmp_path, caplog):
  run = runs.run(tmp_path / "run")
  run.train()
  newest = tmp_path / "run" / "checkpoints" / "6"
  shutil.copytree(newest, tmp_path / "copy")
  for damage in (_remove_metadata, _empty, _cut_all, _lose_the_data_state):
    shutil.rmtree(newest)
    shutil.copytree(tmp_path / "copy", newest)
    damage(newest)
    caplog.clear()
    with (
      caplog.at_level(logging.WARNING, logger="dllm_jax"),
      jax.set_mesh(run.mesh),
      Checkpoints(tmp_path / "run", writes=False) as checkpoints,
    ):
      state, data_state = run.program.restore(checkpoints)
    assert (int(state.step), data_state["batch"]) == (3, 3), damage
    assert newest.is_dir(), "one who only reads moves nothing"
    listed = 6 in checkpoints.steps()
    assert not listed or "checkpoint 6" in caplog.text, damage


def test_who_reads_leaves_a_save_in_progress_alone(tmp_path):
  run = runs.run(tmp_path / "run")
  run.train()
  saving = tmp_path / "run" / "checkpoints" / "9.orbax-checkpoint-tmp"
  saving.mkdir()
  assert int(run.state.step) == 6
  runs.Run.open(tmp_path / "run", devices=jax.devices()[:1]).state
  assert saving.is_dir()
  checkpoints = Checkpoints(tmp_path / "run")
  for _ in range(100):  # Remains are removed in the background.
    if not saving.is_dir():
      break
    time.sleep(0.1)
  checkpoints.close()
  assert not saving.is_dir()


def test_no_readable_checkpoint_is_an_error(tmp_path):
  run = runs.run(tmp_path / "run")
  run.train()
  for step in ("3", "6"):
    _damage(tmp_path / "run" / "checkpoints" / step)
  with pytest.raises(ValueError, match=r"no checkpoint .* .steps 3, 6"):
    runs.run(tmp_path / "run").train()


@pytest.mark.all
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

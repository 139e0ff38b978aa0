"""Checkpoints in buckets: what is complete there, damage, and going on."""

import logging

import jax
import numpy as np
import pytest

from dllm_jax.core import paths
from dllm_jax.training import checkpoint
from dllm_jax.training.staged import MARKER
from tests import runs


def same(state, other):
  for a, b in zip(runs.parameters(state), runs.parameters(other), strict=True):
    np.testing.assert_array_equal(a, b)


def opened(workdir):
  return runs.Run.open(workdir, devices=jax.devices()[:1]).state


def test_steps_count_when_their_last_object_is_there(bucket):
  folder = paths.place(bucket) / "x" / "checkpoints"
  assert checkpoint.steps_in(folder.parent) == []
  for step in (3, 6, 12):
    (folder / str(step) / "state" / MARKER).write_text("an item's own")
  for step in (3, 12):
    (folder / str(step) / MARKER).write_text("done")
  assert checkpoint.steps_in(folder.parent) == [3, 12]


@pytest.mark.all
def test_a_run_lives_in_a_bucket(bucket, tmp_path, caplog):
  workdir = f"{bucket}/runs/x"
  run = runs.run(workdir)
  run.train()
  steps = checkpoint.steps_in(workdir)
  assert steps[-1] == 6
  same(opened(workdir), run.state)
  # A save that was cut off: all is there but what is written last.
  newest = paths.place(workdir) / "checkpoints" / "6"
  (newest / MARKER).unlink()
  assert checkpoint.steps_in(workdir) == steps[:-1]
  same(opened(workdir), opened(workdir))
  assert int(opened(workdir).step) == 3
  with caplog.at_level(logging.WARNING, logger="dllm_jax"):
    again = runs.run(workdir)
    assert again.train()["step"] == 6
  assert checkpoint.steps_in(workdir) == steps
  same(opened(workdir), run.state)
  # One that is complete and damaged.
  files = [p for p in walk(newest / "state") if p.name != MARKER]
  for file in files:
    file.write_bytes(file.read_bytes()[: file.stat().length // 2])
  with caplog.at_level(logging.WARNING, logger="dllm_jax"):
    assert runs.run(workdir).train()["step"] == 6
  assert "checkpoint 6" in caplog.text and "skipped" in caplog.text
  same(opened(workdir), run.state)
  aside = paths.place(workdir) / "unreadable"
  assert [p.name for p in aside.iterdir()] == ["6-0"]


def walk(path):
  for one in path.iterdir():
    if one.is_dir():
      yield from walk(one)
    else:
      yield one


def test_several_processes_do_not_save_on_s3(stores, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(ValueError, match="use gs:// or a disk"):
    checkpoint.Checkpoints(stores.bucket("s3") + "/x")

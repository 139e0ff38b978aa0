"""Whole commands on buckets, and runs that are killed while they save there."""

import json
import os
import signal
import time

import jax
import numpy as np
import pytest

from dllm_jax.core import paths
from dllm_jax.data.tokenizer import make_tokenizer
from dllm_jax.training import checkpoint
from dllm_jax.training.staged import MARKER
from tests import runs

STEPS = 12


def _train(workdir):
  return runs.often_saved(
    workdir, training__steps=STEPS, logging__tensorboard="true"
  )


def _done(*args):
  process = runs.dllm(*args)
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  return json.loads(out.splitlines()[-1])


def _parameters(workdir):
  run = runs.Run.open(workdir, devices=jax.devices()[:1])
  assert int(run.state.step) == STEPS
  return runs.parameters(run.state)


def _kill_while_saving(workdir, step):
  """Kills a run when a step has begun to be written and is not complete."""
  process = runs.dllm(*_train(workdir))
  begun = paths.place(workdir) / "checkpoints" / str(step)
  while process.poll() is None and not begun.exists():
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  process.communicate()
  return not (begun / MARKER).exists()


# `dllm` that dies by itself when step 8 is uploaded and not yet marked.
_DIES = """
import os, sys
from dllm_jax.cli import main
from dllm_jax.core import files
upload = files.upload
def cut(folder, path):
  upload(folder, path)
  if path.name == "8":
    os.kill(os.getpid(), 9)
files.upload = cut
sys.exit(main.main(sys.argv[1:]))
"""


def _kill_before_the_marker(workdir):
  runs.dllm(*_train(workdir), program=("-c", _DIES)).communicate(timeout=300)
  begun = paths.place(workdir) / "checkpoints" / "8"
  return begun.exists() and not (begun / MARKER).exists()


@pytest.mark.all
def test_kills_during_saves_change_nothing(bucket, tmp_path):
  _done(*_train(tmp_path / "whole"))
  workdir = f"{bucket}/run"
  if paths.on_s3(workdir):  # whose uploads are too short to be met by chance
    cut = [_kill_before_the_marker(workdir)]
    assert checkpoint.steps_in(workdir) == [4]
  else:
    cut = [_kill_while_saving(workdir, step) for step in (4, 8, 12)]
  assert any(cut)
  assert _done(*_train(workdir))["step"] == STEPS
  assert checkpoint.steps_in(workdir) == [8, 12]
  for a, b in zip(
    _parameters(workdir), _parameters(tmp_path / "whole"), strict=True
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.all
def test_commands_on_a_bucket(bucket, tmp_path):
  workdir = f"{bucket}/run"
  _done(*_train(workdir))
  events = list((paths.place(workdir) / "tensorboard").iterdir())
  assert events
  sampled = _done(
    "sample", f"--workdir={workdir}", "--length=16", f"--trace={bucket}/t.html"
  )
  assert len(sampled["samples"]) == 1
  assert "<html" in (paths.place(bucket) / "t.html").read_text()
  first = _done("evaluate", f"--workdir={workdir}")
  again = _done("evaluate", f"--workdir={workdir}")
  assert again["forward_tokens"] == 0 < first["forward_tokens"]
  assert again["bits_per_token"] == first["bits_per_token"]
  kept = paths.place(workdir) / "evaluation"
  assert list(kept.iterdir())
  page = f"{bucket}/pages/r.html"
  _done("report", f"--workdirs={workdir}", f"--output={page}", "--rounds=2")
  assert "<html" in paths.place(page).read_text()
  _done("convert", f"--workdir={workdir}", f"--to_hf={bucket}/hf", "--as=llada")
  _done("convert", f"--from_hf={bucket}/hf", f"--workdir={bucket}/again")
  again = _done("sample", f"--workdir={bucket}/again", "--length=16")
  assert len(again["samples"]) == 1
  for folder in ("hf", "again"):
    assert not (paths.place(bucket) / folder / "unfinished").exists()


@pytest.mark.all
def test_a_bucket_that_is_not_there_is_a_mistake(bucket):
  process = runs.dllm(*_train(bucket.replace("bucket-", "none-") + "/x"))
  _, err = process.communicate(timeout=100)
  assert process.returncode == 2
  assert "does not exist; make the bucket first" in err.splitlines()[-1]


@pytest.mark.all
def test_two_processes_save_in_a_bucket(stores, tmp_path):
  """Both are killed, one after the other and while they save; then go on."""
  fields = {
    "mesh__data": 2,
    "training__steps": 16,
    "training__heartbeat_seconds": 20.0,
    "checkpoint__every_steps": 4,
    "logging__every_steps": 1,
    "evaluation__batches": 1,
  }
  resolved = runs.tiny(**fields)
  workdir = f"{stores.bucket('gs')}/run"
  saved = paths.place(workdir) / "checkpoints"
  launcher, running = runs.job(
    tmp_path / "run", resolved, "--restarts=5", "--grace=0.5", at=workdir
  )
  for step, victim in ((4, 0), (8, 1), (12, 0)):
    limit = time.monotonic() + 300
    while not (saved / str(step)).exists() and launcher.poll() is None:
      assert time.monotonic() < limit
      time.sleep(0.02)
    before = running()
    os.kill(before[victim], signal.SIGKILL)
    while running() == before and launcher.poll() is None:
      assert time.monotonic() < limit
      time.sleep(0.1)
  launcher.communicate(timeout=600)
  assert launcher.returncode == 0, (tmp_path / "run.log").read_text()
  whole = runs.run(tmp_path / "whole", **fields | {"mesh__data": 1})
  whole.train()
  state = runs.Run.open(workdir, devices=jax.devices()[:1]).state
  assert int(state.step) == 16
  for a, b in zip(
    runs.parameters(state), runs.parameters(whole.state), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_tokenizer_lies_in_a_bucket(bucket, tmp_path):
  made = make_tokenizer("bpe:260", [], training_texts=["to be or not to be"])
  file = paths.place(bucket) / "own" / "tokenizer.json"
  file.write_text(made.definition)
  read = make_tokenizer(str(file), [])
  assert read.decode(read.prompt("not to be")) == "not to be"

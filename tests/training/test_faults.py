"""What is left when the disk is full or the data is gone: the last save."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from dllm_jax.cli.main import main
from tests import runs

CHILD = """
import os, subprocess, sys
disk = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], check=True)
done = subprocess.run(sys.argv[3:])
subprocess.run(["cp", "-r", disk + "/run", sys.argv[2]], check=True)
sys.exit(done.returncode)
"""


def _config(path, resolved):
  path.write_text(
    "from ml_collections import ConfigDict\n"
    f"def get_config(): return ConfigDict({resolved.to_dict()!r})\n"
  )
  return path


def _same(run, whole):
  for a, b in zip(
    runs.parameters(run.state), runs.parameters(whole.state), strict=True
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.all
def test_a_full_disk_leaves_the_last_save(tmp_path):
  """A disk of 1 MiB, and checkpoints of 0.2 MiB that are all kept."""
  resolved = runs.tiny(
    checkpoint__every_steps=1, checkpoint__keep=100, training__steps=40
  )
  disk = tmp_path / "small disk"
  disk.mkdir()
  command = [sys.executable, "-m", "dllm_jax", "train"]
  command += [f"--config={_config(tmp_path / 'config.py', resolved)}"]
  command += [f"--workdir={disk / 'run'}"]
  isolated = ["unshare", "--mount"]
  isolated += [] if os.geteuid() == 0 else ["--map-root-user"]
  allowed = shutil.which("unshare") and subprocess.run(
    [*isolated, "mount", "-t", "tmpfs", "none", disk],
    capture_output=True,
    check=False,
  )
  if not allowed or allowed.returncode:
    pytest.skip("a small disk needs a mount, which is not allowed here")
  flag = "--xla_force_host_platform_device_count=1"
  done = subprocess.run(
    [*isolated, sys.executable, "-c", CHILD, disk, tmp_path / "run", *command],
    cwd=runs.ROOT,
    # The same optimisations, for the same bits; of two flags the last counts.
    env=os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {flag}"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1, done.stderr
  (line,) = [x for x in done.stderr.splitlines() if x.startswith("dllm:")]
  assert "the disk is full" in line
  assert "Traceback" not in done.stderr
  # On a disk with space, it goes on from what was saved last.
  run = runs.run(
    tmp_path / "run",
    checkpoint__every_steps=100,
    checkpoint__keep=100,
    training__steps=40,
  )
  saved = int(run.state.step)
  assert 0 < saved < 40
  run.train()
  whole = runs.run(
    tmp_path / "whole", checkpoint__every_steps=100, training__steps=40
  )
  whole.train()
  _same(run, whole)


@pytest.mark.all
def test_data_files_that_disappear(tmp_path, capsys):
  data = tmp_path / "data"
  data.mkdir()
  for part in range(4):
    rows = (json.dumps({"text": f"{i} " * 9}) for i in range(part, 200, 4))
    (data / f"{part}.jsonl").write_text("\n".join(rows))
  fields = {
    "data__path": str(data),
    "data__tokenizer": "byte",
    "data__packing": "packed",
    "data__in_memory_bytes": 0,
    "data__virtual_shards": 4,
    "mesh__data": 8,
  }
  endless = runs.tiny(training__steps=1_000_000, **fields)
  workdir = tmp_path / "run"

  def lose():
    while runs.steps_logged(workdir) < 5:
      if over.is_set():
        return
      time.sleep(0.01)
    (data / "2.jsonl").rename(tmp_path / "lost")

  over = threading.Event()
  loser = threading.Thread(target=lose, daemon=True)
  loser.start()
  config = _config(tmp_path / "config.py", endless)
  status = main(["train", f"--config={config}", f"--workdir={workdir}"])
  over.set()
  loser.join()
  assert status == 1
  (line,) = capsys.readouterr().err.strip().splitlines()
  assert "the data cannot be read after step" in line and "2.jsonl" in line
  pathlib.Path(tmp_path / "lost").rename(data / "2.jsonl")
  saved = int(runs.Run.open(workdir, devices=jax.devices()).state.step)
  assert saved >= 3
  run = runs.run(workdir, training__steps=saved + 4, **fields)
  run.train()
  whole = runs.run(tmp_path / "whole", training__steps=saved + 4, **fields)
  whole.train()
  _same(run, whole)

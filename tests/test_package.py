"""The wheel: it installs outside the checkout, configs and text inside it."""

import json
import os
import subprocess
import sys
import zipfile

import pytest

from tests.runs import ROOT


@pytest.mark.all
def test_the_wheel_works_outside_the_checkout(tmp_path):
  pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
  subprocess.run(
    [*pip, "wheel", "--no-deps", f"--wheel-dir={tmp_path}", ROOT],
    check=True,
    capture_output=True,
  )
  (wheel,) = tmp_path.glob("*.whl")
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
  assert "dllm_jax/configs/shakespeare.py" in names
  assert "dllm_jax/data/corpora/shakespeare.txt" in names
  assert not any(name.startswith("tests/") for name in names)
  site = tmp_path / "site"
  subprocess.run(
    [*pip, "install", "--no-deps", f"--target={site}", wheel],
    check=True,
    capture_output=True,
  )
  # From another directory: neither configs nor text come from the checkout.
  elsewhere = tmp_path / "else where"
  elsewhere.mkdir()
  env = os.environ | {"PYTHONPATH": str(site)}
  done = subprocess.run(
    [
      sys.executable,
      "-P",
      "-m",
      "dllm_jax",
      "train",
      "--config=smoke",
      "--workdir=run",
      "--config.training.steps=1",
      "--config.model.width=16",
      "--config.evaluation.batches=1",
      "--config.mesh.data=-1",
    ],
    cwd=elsewhere,
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout.splitlines()[-1])["step"] == 1

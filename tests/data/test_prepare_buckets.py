"""Preparing into buckets: the same bytes as on a disk, shares, kills, reading."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dllm_jax import data
from dllm_jax.core import paths

SETTINGS = {"length": 16, "piece_bytes": 1500, "dedup": "exact"}


@pytest.fixture
def source(tmp_path):
  texts = [f"document {i % 90} {'x' * (i % 40)}" for i in range(200)]
  path = tmp_path / "docs.jsonl"
  path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
  return str(path)


@pytest.fixture
def whole(tmp_path, source):
  output = tmp_path / "whole"
  data.prepare(source, "byte", str(output), workers=1, **SETTINGS)
  return {p.name: p.read_bytes() for p in output.iterdir()}


@pytest.fixture
def here(stores, tmp_path, monkeypatch):
  """ArrayRecord's own reader of gs://, and a cache for what it cannot read."""
  monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", stores.gcs)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.chdir(tmp_path)


def _bytes(output):
  return {p.name: p.read_bytes() for p in paths.place(output).iterdir()}


@pytest.mark.all
def test_shares_in_a_bucket(here, bucket, source, whole, tmp_path):
  output = f"{bucket}/a/tokens"
  first = data.prepare(
    source, "byte", output, shard="1/2", workers=1, **SETTINGS
  )
  assert first["missing_pieces"] > 0
  with pytest.raises(ValueError, match="was not finished"):
    data.load(data.Dataset(path=output, length=16))
  with pytest.raises(ValueError, match="another tokenizer"):
    data.prepare(source, "char", output, shard="0/2", workers=1, **SETTINGS)
  data.prepare(source, "byte", output, shard="0/2", workers=1, **SETTINGS)
  assert _bytes(output) == whole
  remote = data.load(data.Dataset(path=output, length=16))
  local = data.load(data.Dataset(path=str(tmp_path / "whole"), length=16))
  assert len(remote.train) == len(local.train)
  for i in (0, len(local.train) - 1):
    for a, b in zip(remote.train[i][:2], local.train[i][:2], strict=True):
      np.testing.assert_array_equal(a, b)
  # Nothing of a name such as `gs:` was made on the disk.
  assert {p.name for p in tmp_path.iterdir()} <= {
    "docs.jsonl",
    "whole",
    "cache",
  }


@pytest.mark.all
def test_from_a_bucket(here, bucket, source, whole):
  text = paths.place(source).read_text()
  paths.place(f"{bucket}/corpus/docs.jsonl").write_text(text)
  output = f"{bucket}/tokens"
  data.prepare(f"{bucket}/corpus/*.jsonl", "byte", output, **SETTINGS)
  made = _bytes(output)
  assert made.keys() == whole.keys()
  manifests = [json.loads(b.pop("manifest.json")) for b in (made, whole)]
  assert made == whole
  for manifest in manifests:
    del manifest["fingerprint"]  # The input has another name.
  assert manifests[0] == manifests[1]


@pytest.mark.all
def test_a_kill_during_an_upload(here, bucket, source, whole):
  output = f"{bucket}/tokens"
  code = (
    "import sys; from dllm_jax import data\n"
    f"data.prepare(*sys.argv[1:], workers=1, **{SETTINGS})"
  )
  call = [sys.executable, "-c", code, source, "byte", output]
  for pieces in (1, 2, 4):
    process = subprocess.Popen(call, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    work = paths.place(output) / "unfinished"
    while len(list(work.glob("counts-*"))) < pieces:
      assert time.monotonic() < deadline and process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
  data.prepare(source, "byte", output, workers=1, **SETTINGS)
  assert _bytes(output) == whole


def test_a_bucket_that_is_not_there(here, bucket, source):
  output = f"{bucket}-of-nobody/tokens"
  with pytest.raises(ValueError, match="does not exist; make") as error:
    data.prepare(source, "byte", output, workers=1, **SETTINGS)
  assert "\n" not in str(error.value)


@pytest.mark.all
def test_an_upload_that_fails_leaves_nothing(
  here, bucket, source, whole, monkeypatch
):
  import shutil

  copy = shutil.copyfileobj

  def cut_off(file, target, size):
    target.write(file.read(10))
    raise OSError("the network is gone")

  output = f"{bucket}/tokens"
  monkeypatch.setattr(shutil, "copyfileobj", cut_off)
  with pytest.raises(OSError, match="the network is gone"):
    data.prepare(source, "byte", output, workers=1, **SETTINGS)
  assert not paths.place(output).exists()
  monkeypatch.setattr(shutil, "copyfileobj", copy)
  data.prepare(source, "byte", output, workers=1, **SETTINGS)
  assert _bytes(output) == whole

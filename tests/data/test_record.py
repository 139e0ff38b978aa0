"""Preparing a corpus: same tokens, same bytes, resumed, refused."""

import collections
import errno
import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from dllm_jax import data
from dllm_jax.data import record

TEXTS = [f"<{i}:{'x' * (i * 7 % 40)}>" for i in range(300)]


@pytest.fixture
def source(tmp_path):
  path = tmp_path / "docs.jsonl"
  path.write_text("\n".join(json.dumps({"text": t}) for t in [*TEXTS, ""]))
  return str(path)


def _bytes(folder):
  return {
    p.name: p.read_bytes() for p in sorted(pathlib.Path(folder).iterdir())
  }


def _rows(rows):
  return [(rows[i][0].tolist(), rows[i][1].tolist()) for i in range(len(rows))]


@pytest.mark.parametrize("packing", ["slices", "packed"])
@pytest.mark.parametrize("length", [16, 48])
def test_one_piece_equals_tokenising_on_the_fly(
  tmp_path, source, packing, length
):
  output = str(tmp_path / "out")
  made = data.prepare(source, "char", output, length=48, packing=packing)
  here = data.load(data.Dataset(path=source, length=length, packing=packing))
  there = data.load(data.Dataset(path=output, length=length))
  assert there.tokenizer == here.tokenizer
  assert there.held_out_text == here.held_out_text
  assert made == {
    "documents": len(TEXTS),
    "empty_documents": 1,
    "duplicate_documents": 0,
    "tokens": sum(map(len, TEXTS)),
    "files": 2,
    "missing_pieces": 0,
  }
  # Segments are numbered from 1 again in each part of a record.
  assert _rows(there.train) == _rows(here.train)
  assert _rows(there.held_out) == _rows(here.held_out)


def test_pieces_hold_every_document_once(tmp_path, source):
  output = str(tmp_path / "out")
  settings = {"length": 64, "packing": "packed", "piece_bytes": 1500}
  made = data.prepare(source, "byte", output, workers=1, **settings)
  assert made["files"] > 10
  corpus = data.load(data.Dataset(path=output, length=32))
  found = collections.Counter()
  for side in (corpus.train, corpus.held_out):
    tokens = [t for i in range(len(side)) for t in side[i][0][side[i][1] > 0]]
    found.update(bytes(tokens).decode().replace("><", ">\n<").split("\n"))
    assert all(side[i][1][0] == 1 for i in range(len(side)))  # No empty row.
  assert found == collections.Counter(TEXTS)


def test_workers_write_the_same_bytes(tmp_path, source, capfd):
  outputs = [str(tmp_path / f"out{w}") for w in (1, 2)]
  for workers, output in enumerate(outputs, 1):
    data.prepare(
      source, "byte", output, length=16, workers=workers, piece_bytes=4000
    )
  assert _bytes(outputs[0]) == _bytes(outputs[1])
  printed = capfd.readouterr()
  assert "prepare" in printed.err
  assert not printed.out


def test_resumes_after_a_kill(tmp_path, source):
  settings = {"length": 16, "piece_bytes": 700}
  whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
  data.prepare(source, "byte", whole, workers=1, **settings)
  # A child that dawdles after each shard, killed after a few.
  code = (
    "import sys, time; from dllm_jax.data import record\n"
    "from dllm_jax.data.prepared import piece\n"
    "write = piece.tokenise\n"
    "piece.tokenise = lambda *a: (write(*a), time.sleep(0.1))\n"
    f"record.prepare(*sys.argv[1:], workers=1, **{settings})"
  )
  child = subprocess.Popen(
    [sys.executable, "-c", code, source, "byte", cut],
    stderr=subprocess.DEVNULL,
  )
  deadline = time.monotonic() + 30
  while len(list(pathlib.Path(cut).glob("unfinished/counts-*.json"))) < 3:
    assert time.monotonic() < deadline
    time.sleep(0.01)
  child.send_signal(signal.SIGKILL)
  child.wait()
  with pytest.raises(ValueError, match="was not finished; run the same dllm"):
    data.load(data.Dataset(path=cut))
  kept = {
    p: p.stat().st_mtime_ns for p in pathlib.Path(cut).glob("train-00000*")
  }
  assert kept
  data.prepare(source, "byte", cut, workers=1, **settings)
  assert _bytes(cut) == _bytes(whole)
  assert all(p.stat().st_mtime_ns == at for p, at in kept.items())


def test_again_does_nothing(tmp_path, source):
  output = str(tmp_path / "out")
  first = data.prepare(source, "byte", output, length=16)
  before = {p: p.stat().st_mtime_ns for p in pathlib.Path(output).iterdir()}
  assert data.prepare(source, "byte", output, length=16) == first
  assert before == {p: p.stat().st_mtime_ns for p in before}


def test_refuses_to_mix(tmp_path, source):
  output = tmp_path / "out"
  data.prepare(source, "byte", str(output), length=16)
  with pytest.raises(ValueError, match="prepared from other input or settings"):
    data.prepare(source, "byte", str(output), length=32)
  other = tmp_path / "other"
  other.mkdir()
  (other / "mine.txt").write_text("precious")
  with pytest.raises(ValueError, match="holds something else"):
    data.prepare(source, "byte", str(other), length=16)
  assert _bytes(other) == {"mine.txt": b"precious"}


def test_prepared_data_has_its_own_settings(tmp_path, source):
  output = str(tmp_path / "out")
  data.prepare(source, "byte", output, length=32)
  corpus = data.load(data.Dataset(path=output, length=32))
  assert corpus.tokenizer.mask_id == 256
  with pytest.raises(ValueError, match="length 12 does not divide"):
    data.load(data.Dataset(path=output, length=12))
  with pytest.raises(ValueError, match="prepared with another tokenizer"):
    data.load(data.Dataset(path=output, length=32, tokenizer="char"))
  (pathlib.Path(output) / "train-00000-of-00001.array_record").unlink()
  with pytest.raises(FileNotFoundError, match="run dllm prepare again"):
    data.load(data.Dataset(path=output, length=32))
  (pathlib.Path(output) / record.MANIFEST).write_text("{}")
  with pytest.raises(ValueError, match="is not the manifest of prepared data"):
    data.load(data.Dataset(path=output, length=32))


@pytest.mark.parametrize("workers", [1, 2])
def test_bad_text_is_one_line(tmp_path, workers):
  for name, content in (("a.txt", b"fine"), ("b.txt", b"bad \xff")):
    (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match="b.txt is not UTF-8 text") as error:
    data.prepare(
      str(tmp_path),
      "byte",
      str(tmp_path / "out"),
      workers=workers,
      piece_bytes=1,
    )
  assert "\n" not in str(error.value)


def test_full_disk_keeps_nothing_broken(tmp_path, source, monkeypatch):
  from array_record.python import array_record_module

  class Full:
    def __init__(self, path, options):
      pathlib.Path(path).write_bytes(b"half a fi")

    def write(self, record):
      raise RuntimeError("write() failed: No space left on device")

  output = str(tmp_path / "out")
  with monkeypatch.context() as patch:
    patch.setattr(array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(OSError, match="the disk is full; make room") as error:
      data.prepare(source, "byte", output, length=16)
  assert error.value.errno == errno.ENOSPC
  assert [p.name for p in pathlib.Path(output).rglob("*")] == [
    "unfinished",
    "plan.json",
  ]
  data.prepare(source, "byte", output, length=16)
  assert len(data.load(data.Dataset(path=output, length=16)).train)


def test_bad_arguments(tmp_path):
  output = str(tmp_path / "out")
  with pytest.raises(FileNotFoundError, match="does not exist"):
    data.prepare(str(tmp_path / "none.txt"), "byte", output)
  with pytest.raises(ValueError, match="workers is 0"):
    data.prepare("shakespeare", "byte", output, workers=0)
  with pytest.raises(ValueError, match="at least one token"):
    data.prepare("shakespeare", "byte", output, length=0)
  (tmp_path / "tokens.bin").write_bytes(bytes(64))
  with pytest.raises(ValueError, match="holds tokens already; train on it"):
    data.prepare(str(tmp_path / "tokens.bin"), "byte", output)
  (tmp_path / "a.txt").write_text("")
  with pytest.raises(ValueError, match="a.txt is empty"):
    data.prepare(str(tmp_path / "a.txt"), "byte", output)

"""Shares of a preparation: one corpus, whoever made it and whoever died."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from dllm_jax import data
from dllm_jax.data import record
from dllm_jax.data.prepared import duplicates, plan, progress

TEXTS = [f"<{i}:{'x' * (i * 7 % 40)}>" for i in range(300)]
SETTINGS = {"length": 16, "piece_bytes": 700}


@pytest.fixture
def source(tmp_path):
  folder = tmp_path / "corpus"
  folder.mkdir()
  for part in range(3):
    lines = (json.dumps({"text": t}) for t in TEXTS[part::3])
    (folder / f"{part}.jsonl").write_text("\n".join(lines))
  return str(folder / "*.jsonl")


def _bytes(folder):
  folder = pathlib.Path(folder)
  return {
    p.relative_to(folder).as_posix(): p.read_bytes()
    for p in folder.rglob("*")
    if p.is_file()
  }


def _whole(source, output, **settings):
  made = data.prepare(
    source, "byte", str(output), workers=1, **SETTINGS | settings
  )
  return made, _bytes(output)


@pytest.mark.parametrize("count", [2, 7])
def test_shares_are_the_whole_byte_for_byte(tmp_path, source, count):
  made, whole = _whole(source, tmp_path / "whole")
  output = str(tmp_path / "shares")
  order = random.Random(count).sample(range(count), count)
  for n, index in enumerate(order, 1):
    share = data.prepare(
      source, "byte", output, shard=f"{index}/{count}", workers=1, **SETTINGS
    )
    if n < count:
      assert share["missing_pieces"] > 0
      with pytest.raises(ValueError, match="was not finished"):
        data.load(data.Dataset(path=output, length=16))
      with pytest.raises(ValueError, match="pieces are missing") as error:
        data.merge(output)
      assert "\n" not in str(error.value)
  assert share == made  # The last one is told of all.
  assert _bytes(output) == whole
  assert data.merge(output) == made
  assert _bytes(output) == whole


def test_shares_of_different_counts_fit(tmp_path, source):
  _, whole = _whole(source, tmp_path / "whole")
  output = str(tmp_path / "shares")
  data.prepare(source, "byte", output, shard="1/3", workers=1, **SETTINGS)
  kept = {
    p: p.stat().st_mtime_ns for p in pathlib.Path(output).glob("*_record")
  }
  data.prepare(source, "byte", output, shard="0/2", workers=1, **SETTINGS)
  data.prepare(source, "byte", output, workers=1, **SETTINGS)  # The rest.
  assert _bytes(output) == whole
  assert kept == {p: p.stat().st_mtime_ns for p in kept}


def test_shares_at_the_same_time(tmp_path, source):
  _, whole = _whole(source, tmp_path / "whole", dedup="exact")
  output = str(tmp_path / "shares")
  errors = []

  def share(index):
    try:
      data.prepare(
        *(source, "byte", output),
        **{"shard": f"{index % 3}/3", "workers": 1, "dedup": "exact"},
        **SETTINGS,
      )
    except BaseException as error:
      errors.append(error)

  # Each share twice: one that was taken for dead goes on beside its successor.
  threads = [threading.Thread(target=share, args=(i,)) for i in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  # A straggler may find that what it was at is whole and cleared away.
  assert all(isinstance(error, FileNotFoundError) for error in errors)
  assert record.is_prepared(output)
  data.merge(output)
  assert _bytes(output) == whole


def test_learned_tokenizers_are_learned_once(tmp_path, source, monkeypatch):
  from dllm_jax.data import byte_pairs

  output = str(tmp_path / "out")
  data.prepare(source, "bpe:270", output, shard="0/2", workers=1, **SETTINGS)
  monkeypatch.setattr(byte_pairs, "learn", None)
  made = data.prepare(
    source, "bpe:270", output, shard="1/2", workers=1, **SETTINGS
  )
  assert made["documents"] == len(TEXTS)


@pytest.mark.parametrize(
  ("tokenizer", "settings", "what"),
  [
    ("char", {}, "another tokenizer;"),
    ("byte", {"length": 32}, "another length;"),
    ("byte", {"held_out": 0.2, "packing": "packed"}, "packing and held_out;"),
    ("byte", {"dedup": "exact"}, "another dedup;"),
    ("byte", {"piece_bytes": 900}, "another input;"),
  ],
)
def test_shares_of_other_settings_are_refused(
  tmp_path, source, tokenizer, settings, what
):
  output = tmp_path / "out"
  data.prepare(source, "byte", str(output), shard="0/2", workers=1, **SETTINGS)
  before = _bytes(output)
  with pytest.raises(ValueError, match=what) as error:
    data.prepare(
      *(source, tokenizer, str(output)),
      **{"shard": "1/2", "workers": 1},
      **SETTINGS | settings,
    )
  assert "\n" not in str(error.value)
  assert _bytes(output) == before


@pytest.mark.all
def test_a_lost_race_of_plans_is_noticed(tmp_path, source, monkeypatch):
  output, other = str(tmp_path / "out"), str(tmp_path / "other")
  plan_of = "unfinished/plan.json"
  data.prepare(source, "char", other, shard="0/2", workers=1, **SETTINGS)
  begin = progress.Progress.begin

  def overtaken(self):  # by a share that saw an empty directory as well
    begin(self)
    text = (tmp_path / "other" / plan_of).read_text()
    (tmp_path / "out" / plan_of).write_text(text)

  for workers in (2, 1):
    shutil.rmtree(output, ignore_errors=True)
    with monkeypatch.context() as patch:
      patch.setattr(progress.Progress, "begin", overtaken)
      with pytest.raises(ValueError, match="another|other settings") as error:
        data.prepare(
          *(source, "byte", output), shard="0/2", workers=workers, **SETTINGS
        )
      assert "\n" not in str(error.value)
    # Nor does what the one that lost has made count.
    with pytest.raises(ValueError, match="pieces are missing"):
      data.merge(output)
  data.prepare(source, "char", output, workers=1, **SETTINGS)
  data.prepare(source, "char", other, workers=1, **SETTINGS)
  assert _bytes(output) == _bytes(other)


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("64/64", "shard 64/64 does not exist; the first of 64 is 0/64"),
    ("0/0", "shard 0/0 does not exist"),
    ("-1/4", "must be a number from 0"),
    ("3", "such as 3/64"),
    ("a/b", "such as 3/64"),
    ("1/2/3", "such as 3/64"),
  ],
)
def test_a_share_that_does_not_exist(tmp_path, source, text, words):
  output = tmp_path / "out"
  with pytest.raises(ValueError, match=words) as error:
    data.prepare(source, "byte", str(output), shard=text)
  assert "\n" not in str(error.value)
  assert not output.exists()


def test_more_shares_than_pieces(tmp_path, source):
  _, whole = _whole(source, tmp_path / "whole")
  output = str(tmp_path / "out")
  made = data.prepare(source, "byte", output, shard="999/1000", **SETTINGS)
  assert made["documents"] == 0 < made["missing_pieces"]
  data.prepare(source, "byte", output, workers=1, **SETTINGS)
  assert _bytes(output) == whole


def test_merging_nothing(tmp_path):
  with pytest.raises(ValueError, match="holds no shards to merge"):
    data.merge(str(tmp_path))


def test_a_compressed_file_is_shared_by_its_documents(tmp_path):
  import gzip

  path = tmp_path / "one.jsonl.gz"
  lines = "\n".join(json.dumps({"text": t}) for t in TEXTS)
  path.write_bytes(gzip.compress(lines.encode()))
  settings = {"length": 16, "held_out": 0.0, "packing": "packed"}
  for index in range(2):
    made = data.prepare(
      *(str(path), "byte", str(tmp_path / "out")),
      **{"shard": f"{index}/2", "workers": 1, "piece_bytes": 500},
      **settings,
    )
  assert made["documents"] == len(TEXTS)
  assert made["files"] > 2
  rows = data.load(data.Dataset(path=str(tmp_path / "out"), length=16)).train
  found = b"".join(
    bytes(rows[i][0][rows[i][1] > 0].tolist()) for i in range(len(rows))
  )
  texts = found.decode().replace("><", ">\n<").split("\n")
  assert sorted(texts) == sorted(TEXTS)


# Exact duplicates.


def _jsonl(path, texts):
  path.write_text("\n".join(json.dumps({"text": t}) for t in texts))


@pytest.fixture
def repetitive(tmp_path):
  folder = tmp_path / "repetitive"
  folder.mkdir()
  rng = random.Random(0)
  for part in range(4):
    texts = [f"text {rng.randrange(80)} {'y' * 40}" for _ in range(60)]
    _jsonl(folder / f"{part}.jsonl", [*texts, "", "é" * part + " same"])
  return str(folder / "*.jsonl")


def _documents(source):
  lines = (
    line
    for path in sorted(pathlib.Path(source).parent.iterdir())
    for line in path.read_text().split("\n")
  )
  return [json.loads(line)["text"] for line in lines]


@pytest.mark.parametrize("at_once", [1, 100, 2**21])
@pytest.mark.few(1)
def test_each_text_is_kept_where_it_comes_first(
  tmp_path, repetitive, monkeypatch, at_once
):
  monkeypatch.setattr(duplicates, "_AT_ONCE", at_once)
  kept = [t for t in dict.fromkeys(_documents(repetitive)) if t]
  _jsonl(tmp_path / "kept.jsonl", kept)
  settings = {"length": 8, "held_out": 0.0}
  data.prepare(
    *(str(tmp_path / "kept.jsonl"), "byte", str(tmp_path / "a")), **settings
  )
  made = data.prepare(
    *(repetitive, "byte", str(tmp_path / "b")),
    **settings | {"dedup": "exact", "piece_bytes": 500, "workers": 1},
    packing="packed",
  )
  assert made["documents"] == len(kept)
  assert made["empty_documents"] == 4
  total = len(_documents(repetitive))
  assert made["duplicate_documents"] == total - 4 - len(kept)
  tokens = []
  for name in "ab":
    rows = data.load(data.Dataset(path=str(tmp_path / name), length=8)).train
    rows = [rows[i] for i in range(len(rows))]
    tokens.append(np.concatenate([r[0][r[1] > 0] for r in rows]).tolist())
  assert tokens[0] == tokens[1]


@pytest.mark.all
def test_duplicates_are_left_out_across_shares(tmp_path, repetitive):
  settings = {"dedup": "exact", "piece_bytes": 500}
  made, whole = _whole(repetitive, tmp_path / "whole", **settings)
  assert made["duplicate_documents"] > 100
  output = str(tmp_path / "out")
  for index in (2, 0, 1):
    shared = data.prepare(
      *(repetitive, "byte", output),
      **{"shard": f"{index}/3", "workers": 2, "length": 16} | settings,
    )
  assert shared == made
  assert _bytes(output) == whole


def test_without_asking_duplicates_stay(tmp_path, repetitive):
  made, _ = _whole(repetitive, tmp_path / "whole")
  assert made["duplicate_documents"] == 0
  assert made["documents"] == len(_documents(repetitive)) - 4


# Pieces.


def test_pieces_grow_with_the_corpus(tmp_path, monkeypatch):
  from dllm_jax.data import source

  form = source.Format()
  path = tmp_path / "a.jsonl"
  for size, count, least, most in (
    (2**20, 1, 2**20, 2**24),
    (2**31, 128, 2**24, 2**24),
    (2**37, 1024, 2**27, 2**27),
    (2**40, 4096, 2**28, 2**28),
  ):
    with path.open("wb") as file:
      file.truncate(size)  # Sparse: nothing is written.
    pieces = plan.cut({str(path): size}, form, None)
    assert len(pieces) == count
    first = pieces[0].spans[0]
    assert least <= (first.stop or size) - first.start <= most


def test_packing_a_few_at_a_time_is_packing_at_once():
  from dllm_jax.data import packing
  from dllm_jax.data.prepared import piece

  rng = np.random.default_rng(0)
  documents = [
    rng.integers(9, size=n).astype(np.int32)
    for n in [*rng.integers(0, 30, size=60), 0, 1, 64]
  ]
  for kind in ("slices", "packed"):
    rows = packing.Rows(documents, length=8, packing=kind)
    packer = piece.Packer(8, kind)
    parts = [packer.add(documents[i : i + 7]) for i in range(0, 63, 7)]
    tokens, segments = map(
      np.concatenate, zip(*parts, packer.rest(), strict=True)
    )
    assert len(tokens) == len(rows)
    for i in range(len(rows)):
      np.testing.assert_array_equal(tokens[i], rows[i][0])
      np.testing.assert_array_equal(segments[i], rows[i][1])


# Kills.


_CHILD = """
import random, sys, time
from dllm_jax import data
from dllm_jax.data.prepared import progress
publish = progress.Progress.publish
def dawdle(*args):  # So that kills come at every point.
  time.sleep(random.random() * 0.01)
  publish(*args)
  time.sleep(random.random() * 0.01)
progress.Progress.publish = dawdle
source, output, shard, dedup, workers = sys.argv[1:]
data.prepare(
  source, "byte", output, shard=shard, dedup=dedup or None,
  workers=int(workers), length=16, piece_bytes=200,
)
"""


def _start(source, output, shard, dedup, workers):
  return subprocess.Popen(
    [sys.executable, "-c", _CHILD, source, output, shard, dedup, str(workers)],
    stderr=subprocess.PIPE,
    text=True,
  )


def _files(output):
  return sum(len(files) for _, _, files in os.walk(output))


def _storm(source, output, *, kills, dedup, workers, seed):
  """Kills shares at random points, one after another, then lets all end."""
  rng = random.Random(seed)
  shards = ["0/3", "1/3", "2/3"]
  died = 0
  while died < kills:
    process = _start(source, output, rng.choice(shards), dedup, workers)
    target = _files(output) + rng.randint(0, 3)
    while _files(output) < target and process.poll() is None:
      time.sleep(0.001)
    time.sleep(rng.random() * 0.01)
    process.kill()
    process.communicate()
    died += process.returncode == -signal.SIGKILL
    assert not (pathlib.Path(output) / record.MANIFEST).exists()
    if process.returncode == 0:  # All of its own is done: none of it is lost.
      shards = [s for s in shards if s != process.args[5]]
  for shard in ["0/3", "1/3", "2/3"] if kills > 1 else ["0/1"]:
    process = _start(source, output, shard, dedup, workers)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors


@pytest.mark.parametrize(
  ("kills", "dedup", "workers"),
  [
    (1, "exact", 1),
    pytest.param(20, "", 1, marks=pytest.mark.all),
    pytest.param(20, "exact", 1, marks=pytest.mark.all),
    pytest.param(20, "exact", 2, marks=pytest.mark.all),
  ],
)
@pytest.mark.all
def test_kills_change_nothing(tmp_path, source, kills, dedup, workers):
  settings = {"dedup": dedup or None, "piece_bytes": 200}
  _, whole = _whole(source, tmp_path / "whole", **settings)
  output = str(tmp_path / "killed")
  _storm(source, output, kills=kills, dedup=dedup, workers=workers, seed=kills)
  assert _bytes(output) == whole

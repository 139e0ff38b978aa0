"""Files that are whole, on disks and in buckets."""

import threading
import time

import pytest

from dllm_jax.core import files, paths


@pytest.fixture(params=["local", "gs", "s3"])
def root(request, tmp_path):
  if request.param == "local":
    return paths.place(tmp_path)
  stores = request.getfixturevalue("stores")
  return paths.place(stores.bucket(request.param)) / "a"


@pytest.mark.all
def test_lines_are_there_before_the_next_one(root, monkeypatch):
  monkeypatch.setattr(files, "_PART_BYTES", 40)
  path = root / "x.jsonl"
  for start in (0, 10):  # a run that is resumed
    lines = files.Lines(path)
    for i in range(start, start + 10):
      lines.add(f'{{"step": {i}}}\n')
    lines.flush()
    assert files.read_lines(path)[-1] == f'{{"step": {i}}}'
    lines.close()
  assert files.read_lines(path) == [f'{{"step": {i}}}' for i in range(20)]
  files.keep_lines(path, lambda line: int(line[9:-1]) < 7)
  assert len(files.read_lines(path)) == 7


@pytest.mark.all
def test_what_was_not_flushed_is_written_within_a_second(root):
  path = root / "x.jsonl"
  lines = files.Lines(path)
  for i in range(5):
    lines.add(f"{i}\n")
  end = time.monotonic() + 5
  while len(files.read_lines(path)) < 5 and time.monotonic() < end:
    time.sleep(0.05)
  assert files.read_lines(path) == list("01234")


@pytest.mark.few(2)
def test_a_file_can_be_read_while_it_is_written(root):
  path = root / "x.jsonl"
  writes = 100 if paths.in_bucket(path) else 10

  def write():
    for i in range(1, writes):
      files.write_whole(path, "line\n" * i)

  files.write_whole(path, "line\n")
  writer = threading.Thread(target=write)
  writer.start()
  while writer.is_alive():
    assert set(files.read_lines(path)) == {"line"}
  writer.join()


def test_bytes_are_written_as_they_are(root):
  path = root / "x.bin"
  files.write_whole(path, "é\n")
  assert path.read_bytes() == b"\xc3\xa9\n"
  files.write_whole(path, b"\xff\r\n")
  assert path.read_bytes() == b"\xff\r\n"


def test_two_writers_of_one_file_lose_nothing(root):
  path = root / "x.jsonl"
  one, two = files.Lines(path), files.Lines(path)
  for lines in (one, two, one):
    lines.add("line\n")
    lines.flush()
  assert files.read_lines(path) == ["line"] * 3


def test_a_folder_is_whole_or_not_at_all(root):
  path = root / "folder"
  with pytest.raises(RuntimeError), files.new_folder(path) as folder:
    (folder / "a.txt").write_text("a")
    raise RuntimeError
  assert not path.exists()
  with files.new_folder(path) as folder:
    (folder / "a.txt").write_text("a")
  assert [p.name for p in path.iterdir()] == ["a.txt"]
  refused = pytest.raises(FileExistsError, match="is not empty")
  with refused, files.new_folder(path):
    pass


def test_a_folder_that_a_kill_cut_short_is_begun_again(bucket):
  path = paths.place(bucket) / "folder"
  # What is there when the writer is gone.
  begun = files.new_folder(path)
  (begun.__enter__() / "old.txt").write_text("a")
  with files.new_folder(path) as folder:
    (folder / "a.txt").write_text("a")
  assert [p.name for p in path.iterdir()] == ["a.txt"]
  begun.gen.close()


def test_folders_move_with_all_that_is_in_them(root):
  source, target = root / "from" / "6", root / "to"
  if not paths.in_bucket(root):
    source.mkdir(parents=True)
    target.mkdir()
    (source / "in").mkdir()
  (source / "mark").write_text("m")
  (source / "in" / "b").write_text("b")
  files.move_folder(source, target / "6-0", "mark")
  assert (target / "6-0" / "in" / "b").read_text() == "b"
  assert (target / "6-0" / "mark").read_text() == "m"
  assert not source.exists()


def test_a_bucket_that_is_not_there_is_one_line(stores):
  for scheme in ("gs", "s3"):
    with pytest.raises(ValueError, match="does not exist; make the bucket"):
      paths.place(f"{scheme}://no-such-bucket/x")
    with pytest.raises(ValueError, match="name a bucket"):
      paths.place(f"{scheme}:///x")


def test_what_is_not_installed_is_named(stores, monkeypatch):
  monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"pip install 'dllm_jax\[gcs\]'"):
    paths.place("gs://elsewhere/x")
  with pytest.raises(ValueError, match=r"pip install 'dllm_jax\[s3\]'"):
    paths.place("s3://elsewhere/x")

"""Documents from files: kinds, pieces, the split, and bad input."""

import gzip
import json
import lzma
import sys

import pytest

from dllm_jax.data import source
from dllm_jax.data.formats import compressed

TEXTS = [f"document {i} " + "é" * (i % 7) for i in range(40)]


def _texts(files, form=source.Format(), span_bytes=2**25):
  pieces = source.spans(files, form, span_bytes)
  return [d.text for piece in pieces for d in source.read(piece, form)]


def _jsonl(path, texts, field="text"):
  lines = (json.dumps({field: t}, ensure_ascii=False) for t in texts)
  path.write_text("\n".join(lines) + "\n", encoding="utf-8")
  return str(path)


def test_bundled_text_is_running():
  [file] = source.find("shakespeare")
  [document] = source.documents([file], source.Format())
  assert document.running
  assert len(document.text) == 1115394


def test_directories_and_globs_list_files_in_order(tmp_path):
  for name in ("b.txt", "a.txt", "sub/c.txt", ".hidden.txt", "d.png"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
  names = lambda path: [f.rsplit("/", 1)[1] for f in source.find(str(path))]
  with pytest.warns(UserWarning, match="are read: 3; left out: 1 .png;"):
    assert names(tmp_path) == ["a.txt", "b.txt", "c.txt"]
  assert names(tmp_path / "*.txt") == ["a.txt", "b.txt"]
  assert names(tmp_path / "s*") == ["c.txt"]


@pytest.mark.parametrize("span_bytes", [1, 7, 64, 10**6])
@pytest.mark.parametrize("kind", ["jsonl", "<sep>", "\n\n"])
def test_pieces_hold_every_document_once(tmp_path, kind, span_bytes):
  if kind == "jsonl":
    file, form = _jsonl(tmp_path / "a.jsonl", TEXTS), source.Format()
  else:
    (tmp_path / "a.txt").write_text(kind.join(TEXTS), encoding="utf-8")
    file = str(tmp_path / "a.txt")
    form = source.Format(document_separator=kind)
  assert _texts([file], form, span_bytes) == TEXTS
  entered = len(source.spans([file], form, span_bytes)) > 1
  assert entered == (span_bytes < 10**6 and kind != "\n\n")


def test_blocks_smaller_than_a_document(tmp_path, monkeypatch):
  monkeypatch.setattr(compressed, "BLOCK_BYTES", 3)
  file = _jsonl(tmp_path / "a.jsonl", TEXTS)
  assert _texts([file], span_bytes=50) == TEXTS


def test_compressed_files(tmp_path):
  _jsonl(tmp_path / "a.jsonl", TEXTS)
  plain = (tmp_path / "a.jsonl").read_bytes()
  with gzip.open(tmp_path / "a.jsonl.gz", "wb") as f:
    f.write(plain)
  with lzma.open(tmp_path / "a.txt.xz", "wb") as f:
    f.write(b"running")
  assert _texts([str(tmp_path / "a.jsonl.gz")], span_bytes=9) == TEXTS
  assert _texts([str(tmp_path / "a.txt.xz")]) == ["running"]


def test_parquet_pieces_are_row_groups(tmp_path):
  import pyarrow
  from pyarrow import parquet

  file = str(tmp_path / "a.parquet")
  table = pyarrow.table({"body": TEXTS, "n": list(range(len(TEXTS)))})
  parquet.write_table(table, file, row_group_size=11)
  form = source.Format(text_field="body")
  assert len(source.spans([file], form, 1)) == 4
  assert _texts([file], form) == TEXTS
  with pytest.raises(ValueError, match="no column 'text'; its columns are: bo"):
    _texts([file])
  with pytest.raises(ValueError, match="holds int, not text"):
    _texts([file], source.Format(text_field="n"))
  (tmp_path / "b.parquet").write_text("no")
  with pytest.raises(ValueError, match="b.parquet is not a Parquet file"):
    _texts([str(tmp_path / "b.parquet")])


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
  with pytest.raises(ImportError, match="need pyarrow"):
    _texts([str(tmp_path / "a.parquet")])


def test_split_holds_out_the_tail_of_running_text():
  document = source.Document("0123456789", "a.txt", running=True)
  assert source.split(document, 0.25) == ("0123456", "789")
  assert source.split(document, 0.0) == ("0123456789", "")


def test_split_holds_out_a_fraction_of_documents():
  n, fraction = 4000, 0.1
  documents = [source.Document(f"text {i}", "a.jsonl") for i in range(n)]
  held_out = 0
  for document in documents:
    train, tail = source.split(document, fraction)
    assert {train, tail} == {document.text, ""}
    assert source.split(document, fraction) == (train, tail)
    held_out += tail != ""
  # Four standard errors of a binomial count.
  assert abs(held_out - n * fraction) < 4 * (n * fraction * 0.9) ** 0.5


def test_cut_archive(tmp_path):
  whole = gzip.compress(b"text " * 1000)
  (tmp_path / "a.txt.gz").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match="is damaged"):
    _texts([str(tmp_path / "a.txt.gz")])


def test_missing_paths(tmp_path):
  with pytest.raises(FileNotFoundError, match="does not exist; give a file"):
    source.find(str(tmp_path / "none.txt"))
  (tmp_path / "a.png").write_text("")
  with pytest.raises(ValueError, match="no data in"):
    source.find(str(tmp_path))
  with pytest.raises(ValueError, match="document_separator is empty"):
    source.Format(document_separator="")

"""Corpora as they are published: each row of docs/data.md, counted exactly."""

import bz2
import gzip
import json
import lzma
import pathlib
import shutil
import sys

import pytest

from dllm_jax import data
from dllm_jax.data import source
from dllm_jax.data.formats import compressed

MDS = pathlib.Path(__file__).parent / "mds"
TEXTS = ["first text", "second, with é", "", "fourth text"]
OTHER = ["never to be trained on"]


def _zstd(data, frames=1):
  import pyarrow

  codec = pyarrow.Codec("zstd")
  cuts = [len(data) * i // frames for i in range(frames + 1)]
  return b"".join(
    codec.compress(data[a:b], asbytes=True)
    for a, b in zip(cuts, cuts[1:], strict=False)
  )


PACK = {
  "": bytes,
  ".gz": gzip.compress,
  ".bz2": bz2.compress,
  ".xz": lzma.compress,
  ".zst": lambda data: _zstd(data, frames=3),
}


def _put(path, data):
  path.parent.mkdir(parents=True, exist_ok=True)
  packed = PACK[path.suffix if path.suffix in PACK else ""](data)
  path.write_bytes(packed)


def _lines(path, texts, field="text", **more):
  rows = [{field: t, "url": "https://example.org/1"} | more for t in texts]
  _put(path, "\n".join(map(json.dumps, rows)).encode() + b"\n")


def _parquet(path, table, **options):
  import pyarrow
  from pyarrow import parquet

  path.parent.mkdir(parents=True, exist_ok=True)
  table = pyarrow.table(table) if isinstance(table, dict) else table
  parquet.write_table(table, path, **options)


def _card(folder, head):
  (folder / "README.md").write_text(f"---\n{head}\n---\n# A card\n")


def c4(at):
  for i in range(2):
    _lines(at / f"en/c4-train.0000{i}-of-00002.json.gz", TEXTS[2 * i :][:2])
  _lines(at / "en/c4-validation.00000-of-00001.json.gz", OTHER)
  _card(at, "license: odc-by")
  return at / "en", "text"


def dolma(at):
  _lines(at / "data/common_crawl-art/shard_00000000.jsonl.zst", TEXTS[:3])
  _lines(at / "data/dolma1_7-wiki/shard_00000001.jsonl.zst", TEXTS[3:])
  _card(at, "license: odc-by")
  return at, "text"


def dclm(at):
  for i in range(2):
    name = f"global-shard_0{i}_of_10/local-shard_0_of_10/shard_0_processed"
    _lines(at / f"{name}.jsonl.zst", TEXTS[2 * i :][:2], metadata={"a": 1})
  return at, "text"


def slimpajama(at):
  for i in range(2):
    name = f"train/chunk{i + 1}/example_train_{i}.jsonl.zst"
    _lines(at / name, TEXTS[2 * i :][:2], meta={"redpajama_set_name": "C4"})
  _lines(at / "validation/chunk1/example_holdout_0.jsonl.zst", OTHER)
  _lines(at / "test/chunk1/example_holdout_0.jsonl.zst", OTHER)
  return at, "text"


def fineweb(at):
  for i in range(2):
    path = at / f"data/CC-MAIN-2013-2{i}/000_00000.parquet"
    _parquet(path, {"text": TEXTS[2 * i :][:2], "language_score": [0.5, 0.5]})
  _parquet(at / "sample/10BT/000_00000.parquet", {"text": OTHER})
  _card(
    at,
    "configs:\n- config_name: default\n  data_files:\n  - split: train\n"
    "    path: data/*/*\n- config_name: sample-10BT\n  data_files:\n"
    "  - split: train\n    path: sample/10BT/*",
  )
  return at, "text"


def the_stack_v2(at):
  files = [{"path": f"{i}.py", "content": t} for i, t in enumerate(TEXTS)]
  _parquet(
    at / "data/train-00000-of-00001.parquet",
    {"repo_name": ["a", "b"], "files": [files[:1], files[1:]]},
  )
  return at, "files.content"


def starcoder(at):
  import pyarrow

  text = pyarrow.array(TEXTS, pyarrow.large_string())
  for name in ("python", "rust"):
    _parquet(
      at / f"{name}/train-00000-of-00001.parquet",
      {"content": text[:2] if name == "python" else text[2:]},
    )
  return at, "content"


def openwebtext(at):
  import pyarrow

  text = pyarrow.array(TEXTS).dictionary_encode()
  _parquet(at / "plain_text/train-00000-of-00001.parquet", {"text": text})
  return at, "text"


def nested(at):
  _parquet(at / "a.parquet", {"doc": [{"body": t, "n": 1} for t in TEXTS]})
  return at / "a.parquet", "doc.body"


def json_column(at):
  import pyarrow

  values = [json.dumps({"body": t}) for t in TEXTS]
  column = pyarrow.array(values, pyarrow.json_())
  _parquet(at / "a.parquet", {"doc": column})
  return at, "doc.body"


def pile(at):
  _lines(at / "train/00.jsonl.zst", TEXTS)
  _lines(at / "val.jsonl.zst", OTHER)
  return at, "text"


def lines_by_name(at, suffix):
  _lines(at / f"corpus{suffix}", TEXTS)
  return at / f"corpus{suffix}", "text"


def array(at):
  rows = [{"text": t, "meta": {"year": 2019}} for t in TEXTS]
  _put(at / "corpus.json.gz", json.dumps(rows, indent=2).encode())
  return at / "corpus.json.gz", "text"


def one_object(at):
  _put(at / "corpus.json", json.dumps({"rows": TEXTS}, indent=2).encode())
  return at / "corpus.json", "rows"


def spark(at):
  _lines(at / "part-00000", TEXTS)
  return at / "part-00000", "text"


def saved(at):
  import datasets

  made = datasets.Dataset.from_dict({"text": TEXTS})
  made.save_to_disk(str(at / "saved"), num_shards=2)
  shutil.copy(
    at / "saved/data-00000-of-00002.arrow", at / "saved/cache-1234.arrow"
  )
  return at / "saved", "text"


def saved_splits(at):
  import datasets

  made = lambda texts: datasets.Dataset.from_dict({"text": texts})
  both = datasets.DatasetDict({"train": made(TEXTS), "test": made(OTHER)})
  both.save_to_disk(str(at))
  return at, "text"


def arrow_file(at):
  import pyarrow
  from pyarrow import feather

  table = pyarrow.table({"text": TEXTS})
  feather.write_feather(table, str(at / "a.feather"), chunksize=3)
  return at / "a.feather", "text"


def mds(at):
  return MDS / "plain", "text"


def mds_packed(at):
  for split, kind in (("train", "zstd"), ("val", "plain")):
    shutil.copytree(MDS / kind, at / split)
  return at, "text"


def text_files(at):
  _put(at / "a.txt.bz2", "\x00".join(TEXTS).encode())
  return at / "a.txt.bz2", None


BY_NAME = [
  (lines_by_name, f"{kind}{packed}")
  for kind in (".jsonl", ".ndjson", ".json")
  for packed in PACK
]
CORPORA = [
  *BY_NAME, c4, dolma, dclm, slimpajama, fineweb, the_stack_v2, starcoder,
  openwebtext, nested, json_column, pile, array, one_object, spark, saved,
  saved_splits, arrow_file, mds, mds_packed, text_files,
]  # fmt: skip


@pytest.mark.parametrize(
  "corpus", CORPORA, ids=lambda c: getattr(c, "__name__", None) or c[1]
)
@pytest.mark.filterwarnings("ignore:.*left out:UserWarning")
def test_documents_and_text_exactly(tmp_path, corpus):
  make, *more = corpus if isinstance(corpus, tuple) else (corpus,)
  path, field = make(tmp_path, *more)
  form = (
    source.Format(text_field=field)
    if field
    else source.Format(document_separator="\x00")
  )
  files = source.find(str(path))
  assert sorted(d.text for d in source.documents(files, form)) == sorted(TEXTS)
  pieces = source.spans(files, form, 1)
  assert sorted(
    d.text for piece in pieces for d in source.read(piece, form)
  ) == sorted(TEXTS)


def test_neither_braces_nor_dates_are_characters(tmp_path):
  rows = [
    {"text": f"row {i} of it", "timestamp": "2019-04-25"} for i in range(20)
  ]
  for name in ("c4.json.gz", "c4.json"):
    _put(tmp_path / name, "\n".join(map(json.dumps, rows)).encode())
    corpus = data.load(data.Dataset(path=str(tmp_path / name)))
    assert not set("{:-") & set(corpus.tokenizer.vocabulary)


def test_a_folder_of_several_kinds_says_what_it_leaves_out(tmp_path):
  _lines(tmp_path / "a.jsonl", TEXTS)
  _lines(tmp_path / "b.jsonl.zst", TEXTS)
  _lines(tmp_path / "test.json.gz", OTHER)
  _lines(tmp_path / "train.json.gz", TEXTS)
  for name in ("notes.txt", "README.md", "a.csv", "b.csv", "tokenizer.json"):
    (tmp_path / name).write_text("{}")
  with pytest.raises(ValueError, match="which split to train on") as error:
    source.find(str(tmp_path))
  assert "\n" not in str(error.value)
  (tmp_path / "train.json.gz").unlink()
  (tmp_path / "test.json.gz").rename(tmp_path / "c.json.gz")
  said = "read: 3; left out: 2 .csv, 1 .json, 1 .md, 1 .txt; a file"
  with pytest.warns(UserWarning, match=said):
    assert len(source.find(str(tmp_path))) == 3
  # What is named is read as it is.
  assert len(source.find(str(tmp_path / "*.md"))) == 1
  assert source.find(str(tmp_path / "notes.txt"))


@pytest.mark.parametrize(
  "names",
  [
    ["train.jsonl", "extra.jsonl"],
    ["test.jsonl", "validation.jsonl"],
    ["data/train-0.jsonl", "data/train-1.jsonl", "sample/1.jsonl"],
    ["a.jsonl", "a.jsonl.gz"],
    ["a/b.jsonl", "c/1.bin", "c/2.bin"],
  ],
)
def test_an_ambiguous_folder_is_refused_with_globs(tmp_path, names):
  for name in names:
    _lines(tmp_path / name, TEXTS)
  with pytest.raises(ValueError, match="not clear; name files or") as error:
    source.find(str(tmp_path))
  message = str(error.value)
  assert "\n" not in message
  globs = [g.split(" ")[0] for g in message.split("one of: ")[1].split(", ")]
  found = [source.find(g) for g in globs]
  assert all(found)
  files = [str(tmp_path / name) for name in names]
  assert sorted(sum(found, [])) == sorted(files)  # And each in one only.


def test_a_card_with_several_configurations(tmp_path):
  for name in ("en", "de"):
    _lines(tmp_path / name / "0.jsonl", TEXTS)
  entry = "- config_name: {0}\n  data_files: {0}/*.jsonl\n"
  _card(tmp_path, "configs:\n" + entry.format("en") + entry.format("de"))
  with pytest.raises(ValueError, match=r"en/0.jsonl \(configuration en\)"):
    source.find(str(tmp_path))


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.txt", b"ok\xff", "a.txt is not UTF-8 text .byte 2.; convert"),
    ("a.jsonl", b'{"text": "a"}\nno\n', "line at byte 14 is not JSON"),
    ("a.jsonl", b'{"body": "a"}\n', "'text'; its fields are: body; set"),
    ("a.jsonl", b"[1]\n", "has no text in field 'text'"),
    ("a.txt.gz", b"not gzip", "a.txt.gz is damaged"),
    ("a.txt.xz", b"not xz", "a.txt.xz is damaged"),
    ("a.json", b'{"text": "a"} {"text"', "neither JSON lines, nor one array"),
    ("a.json", b'[{"text": "a"}, {"te', "neither JSON lines, nor one array"),
    ("a.json", b'[{"text": "a"}] x', "neither JSON lines, nor one array"),
    ("a.json", b'[{"text": "a"} {"text": "b"}]', "neither JSON lines"),
    ("a.json", b"a running text", "neither JSON lines, nor one array"),
    ("a.csv", b"id,text\n1,a", "files named .csv are not read; legal are"),
    ("a.jsonl", b'{"text": ["a", 1]}', "'text' holds list, not text; set"),
    ("a.jsonl", b'{"m": {"t": "a"}}', "'text'; its fields are: m; set"),
    ("a.mds", b"\x01", "not an MDS shard, or cut off"),
    ("a.arrow", b"\x01", "not an Arrow file"),
    ("a.txt", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
  ],
)
def test_bad_files(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    list(source.documents(source.find(str(tmp_path / name)), source.Format()))
  assert "\n" not in str(error.value)
  assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_files_that_are_cut_off(tmp_path, suffix):
  path = tmp_path / f"a.jsonl{suffix}"
  _lines(path, [f"text {i}" for i in range(100)])
  path.write_bytes(path.read_bytes()[:-5])
  with pytest.raises(ValueError, match="is damaged") as error:
    list(source.documents([str(path)], source.Format()))
  assert "\n" not in str(error.value)


def test_values_longer_than_a_block(tmp_path, monkeypatch):
  monkeypatch.setattr(compressed, "BLOCK_BYTES", 3)
  for make in (array, one_object, lambda at: lines_by_name(at, ".json")):
    path, field = make(tmp_path)
    found = source.documents([str(path)], source.Format(text_field=field))
    assert [d.text for d in found] == TEXTS


def test_zst_without_pyarrow(tmp_path, monkeypatch):
  _lines(tmp_path / "a.jsonl.zst", TEXTS)
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(ImportError, match="need pyarrow: pip install"):
    list(source.documents([str(tmp_path / "a.jsonl.zst")], source.Format()))


def test_a_missing_shard(tmp_path):
  shutil.copytree(MDS / "plain", tmp_path / "mds")
  (tmp_path / "mds/shard.00001.mds").unlink()
  with pytest.raises(FileNotFoundError, match="shard.00001.mds is missing"):
    source.find(str(tmp_path / "mds"))

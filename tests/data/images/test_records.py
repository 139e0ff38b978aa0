"""Pictures with texts from files of every form, and what is wrong with some."""

import base64
import gzip
import io
import json
import tarfile

import numpy as np
import pytest

from dllm_jax import data
from dllm_jax.data import Dataset
from dllm_jax.data.images.pictures import png
from dllm_jax.data.images.records import Bad, find, read

RED = png(np.full((8, 8, 3), (200, 30, 30), np.uint8))
BLUE = png(np.full((8, 8, 3), (30, 30, 200), np.uint8))


class Grey:
  """An image tokenizer: the mean of each 4 x 4 tile, of 16 codes."""

  codes, side = 16, 4

  def encode(self, pixels):
    rows, height, width, _ = pixels.shape
    tiles = pixels.mean(-1).reshape(rows, height // 4, 4, width // 4, 4)
    return (
      np.clip((tiles.mean((2, 4)) + 1) * 8, 0, 15).astype(int).reshape(rows, -1)
    )


def shard(path, members, mode="w"):
  with tarfile.open(path, mode) as tar:
    for name, body in members:
      info = tarfile.TarInfo(name)
      info.size = len(body)
      tar.addfile(info, io.BytesIO(body))
  return path


def said(path):
  return [(one.image, one.text) for one in read(find(str(path))) if one.image]


def test_webdataset_samples(tmp_path):
  """Keys end at the first dot of the file name; folders stay in them."""
  path = shard(
    tmp_path / "a-000.tar",
    [
      ("v1.0/one.jpg", RED), ("v1.0/one.TXT", b"a red one\n"),
      (".hidden", b"x"), ("README", b"x"),
      ("two.png", BLUE), ("two.json", b'{"prompt": "a blue two"}'),
      ("two.png", RED), ("two.txt", b"another two"),
      ("000.seg.png", RED), ("000.webp", BLUE), ("000.caption", b"zeros"),
    ],
  )  # fmt: skip
  assert said(path) == [
    (RED, "a red one"), (BLUE, "a blue two"), (RED, "another two"),
    (BLUE, "zeros"),
  ]  # fmt: skip


def test_shards_by_range(tmp_path):
  for i in range(9, 12):
    shard(
      tmp_path / f"s_{i:03}.tgz",
      [("a.png", RED), ("a.txt", str(i).encode())],
      "w:gz",
    )
  found = find(str(tmp_path / "s_{009..010}.tgz"))
  assert [one.text for one in read(found)] == ["9", "10"]
  assert len(find(str(tmp_path))) == 3


def test_jsonl_and_parquet(tmp_path):
  pa, pq = (
    pytest.importorskip("pyarrow"),
    pytest.importorskip("pyarrow.parquet"),
  )
  (tmp_path / "red.png").write_bytes(RED)
  turn = {"role": "assistant", "content": "red"}
  parts = [
    {"type": "image", "image": "red.png"},
    {"type": "text", "text": "hue?"},
  ]
  rows = [
    {"image": "red.png", "text": "by path"},
    {"image": base64.b64encode(BLUE).decode(), "caption": "by base64"},
    {"messages": [{"role": "user", "content": parts}, turn]},
    {"image": "red.png", "conversations": [
      {"from": "human", "value": "<image>\nhue?"}, {"from": "gpt", "value": "red"}
    ]},
    {"text": "no picture"},
  ]  # fmt: skip
  path = tmp_path / "pairs.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  one, two, three, four, five = read([str(path)])
  assert (one.image, one.text) == (RED, "by path")
  assert (two.image, two.text) == (BLUE, "by base64")
  for chat in (three, four):
    assert chat.image == RED and chat.text is None
    assert [m["content"] for m in chat.messages] == ["hue?", "red"]
  assert (five.image, five.text) == (None, "no picture")
  table = pa.table({
    "image": [{"bytes": RED, "path": None}, {"bytes": BLUE, "path": None}],
    "text": ["a", "b"],
  })
  pq.write_table(table, tmp_path / "pairs.parquet")
  found = list(read([str(tmp_path / "pairs.parquet")]))
  assert [(r.image, r.text) for r in found] == [(RED, "a"), (BLUE, "b")]


def idx(folder, pictures, labels):
  head = lambda x: bytes((0, 0, 8, x.ndim)) + np.array(x.shape, ">u4").tobytes()
  for name, x in (("images-idx3", pictures), ("labels-idx1", labels)):
    body = gzip.compress(head(x) + x.astype(np.uint8).tobytes())
    (folder / f"t10k-{name}-ubyte.gz").write_bytes(body)


def test_digits(tmp_path):
  pictures = np.arange(3 * 64).reshape(3, 8, 8)
  idx(tmp_path, pictures, np.array([7, 8, 1]))
  found = list(read(find(str(tmp_path))))
  assert [one.text for one in found] == ["a seven", "an eight", "a one"]
  (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
  with pytest.raises(
    FileNotFoundError, match="labels-idx1-ubyte.gz is missing"
  ):
    list(read(find(str(tmp_path))))


@pytest.mark.parametrize(
  "members, words",
  [
    ([("a.txt", b"no picture")], "a.tar: a: a sample needs a picture"),
    ([("a.png", RED), ("a.cls", b"3")], "a sample needs its text.*has .png, .cls"),
    ([("a.png", RED[:40]), ("a.txt", b"cut")], "a.tar: a is no picture"),
  ],
)  # fmt: skip
def test_bad_samples(tmp_path, members, words):
  """Each is one line with the file's name, and left out where that is asked."""
  good = [
    ("b.png", RED),
    ("b.txt", b"good"),
    ("c.png", BLUE),
    ("c.txt", b"more"),
  ]
  path = shard(tmp_path / "a.tar", members + good)
  fields = dict(
    path=str(path), format="pixels", length=64, held_out=0.0, image_size=8
  )
  with pytest.raises(ValueError, match=words) as caught:
    data.load(Dataset(**fields))
  assert "\n" not in str(caught.value) and "skip_bad" in str(caught.value)
  assert len(data.load(Dataset(**fields, skip_bad=True)).train) == 2


def test_bad_files(tmp_path):
  with pytest.raises(FileNotFoundError, match="JSONL.*WebDataset.*IDX"):
    find(str(tmp_path / "none"))
  (tmp_path / "a.txt").write_text("text")
  with pytest.raises(ValueError, match="a.txt holds no pictures"):
    find(str(tmp_path / "a.txt"))
  (tmp_path / "cut.tar").write_bytes(b"x" * 700)
  with pytest.raises(ValueError, match="cut.tar is no whole tar archive"):
    list(read([str(tmp_path / "cut.tar")]))
  (tmp_path / "b.jsonl").write_text('{"image": "gone.png", "text": "a"}\n')
  (bad,) = read([str(tmp_path / "b.jsonl")])
  assert isinstance(bad, Bad) and "gone.png" in bad.reason


def pairs(folder, number=40):
  names = ("red", "blue")
  rows = [
    {"image": f"{names[i % 2]}.png", "text": f"a {names[i % 2]} {i % 5}"}
    for i in range(number)
  ]
  for name, body in zip(names, (RED, BLUE), strict=True):
    (folder / f"{name}.png").write_bytes(body)
  path = folder / "pairs.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def test_rows(tmp_path):
  """A picture with a caption is one row to draw, and one to name it."""
  dataset = Dataset(
    path=pairs(tmp_path), format="images", tokenizer="bpe:262", image_size=8,
    length=4 + 3 + 40, held_out=0.3,
  )  # fmt: skip
  corpus = data.load(dataset, images=Grey())
  v, text = corpus.tokenizer.images, corpus.tokenizer
  assert v.offset + Grey.codes == text.vocab_size and v.tokens == 4
  assert len(corpus.train) + len(corpus.held_out) == 80
  drawn, named = corpus.train[0], corpus.train[1]
  assert drawn.tokens[0] == v.pad and named.tokens[0] == v.understand
  codes = drawn.tokens[-5:-1]
  assert v.is_code(codes).all() and (named.tokens[2:6] == codes).all()
  assert drawn.mask.sum() == 6  # the picture and its marks
  answer = text.decode(named.tokens[named.mask]).strip()
  assert answer.startswith("a ") and "What" not in answer
  shown = text.decode(named.tokens, special=True)
  assert "<|mmu|><|soi|>" in shown and "What is this?<|eot_id|>" in shown
  again = data.tokenizer_from_json(text.to_json())
  assert again == text and again.images == v


def test_rows_refused(tmp_path):
  path = pairs(tmp_path, 4)
  fields = dict(path=path, format="images", length=60, held_out=0.0)
  load = lambda images=Grey(), **more: data.load(
    Dataset(**fields | more), images=images
  )
  with pytest.raises(ValueError, match="image_size 6 must be a multiple of 4"):
    load(image_size=6)
  with pytest.raises(ValueError, match="needs data.image_tokenizer"):
    load(None, image_size=8)
  with pytest.raises(ValueError, match="'char' has no special tokens"):
    load(image_size=8, tokenizer="char")
  with pytest.raises(ValueError, match="data.length 60 must be image_size"):
    load(format="pixels")


def test_pixels(tmp_path):
  dataset = Dataset(
    path=pairs(tmp_path, 4), format="pixels", length=64, held_out=0.0
  )
  corpus = data.load(dataset)
  assert corpus.tokenizer.vocab_size == 2**24 + 1
  assert corpus.train[0].tokens.tolist() == [200 << 16 | 30 << 8 | 30] * 64

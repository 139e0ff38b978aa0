"""Tokens as others prepared them: every form, by index, without a copy."""

import json

import numpy as np
import pytest

from dllm_jax import data
from dllm_jax.data.formats import tokens
from tests.data import token_files

IDS = (np.arange(50) % 9 + 1).tolist()
DOCUMENTS = [IDS[:7], IDS[7:8], IDS[8:30], IDS[30:]]


def _load(path, **settings):
  settings = {"tokenizer": "numbers:12", "length": 8, "held_out": 0} | settings
  return data.load(data.Dataset(path=str(path), **settings))


def _kept(corpus):
  rows = [corpus.train[i] for i in range(len(corpus.train))]
  return np.concatenate([row.tokens[row.mask] for row in rows]).tolist()


def _made(folder, form):
  if form.startswith("megatron"):
    return token_files.megatron(folder / "a", DOCUMENTS, form.partition(" ")[2])
  path = folder / ("a.npy" if form.startswith("npy") else "a.bin")
  if form == "modded":
    return token_files.modded(path, IDS)
  if form == "nanogpt":
    np.array(IDS, np.uint16).tofile(path)
  else:
    ids = np.array(IDS, form.split()[1])
    np.save(path, ids.reshape(5, 10) if "rows" in form else ids)
  return str(path)


@pytest.mark.parametrize("packing", ["slices", "packed"])
@pytest.mark.parametrize(
  "form",
  [
    "megatron uint16",
    "megatron int32",
    "megatron uint8",
    "modded",
    "nanogpt",
    "npy int64",
    "npy uint16",
    "npy uint32 rows",
  ],
)
def test_every_form(tmp_path, form, packing):
  path = _made(tmp_path, form)
  corpus = _load(path, packing=packing)
  assert len(corpus.train) == 7
  assert _kept(corpus) == IDS
  assert isinstance(tokens.opened(path).ids, np.memmap)
  iterator = data.train_iterator(corpus, batch_size=2, seed=0)
  assert next(iterator).tokens.shape == (2, 8)
  iterator.close()


def test_megatron_documents_are_kept(tmp_path):
  token_files.megatron(tmp_path / "a", DOCUMENTS)
  whole = _load(tmp_path / "a.bin", packing="packed", length=50).train[0]
  expected = np.repeat([1, 2, 3, 4], [len(d) for d in DOCUMENTS])
  np.testing.assert_array_equal(whole[1], expected)
  rows = _load(tmp_path / "a.idx", packing="packed").train
  assert rows[0][1].tolist() == [1] * 7 + [2]
  assert rows[1][1].tolist() == [1] * 8  # A document begins at its start.
  assert rows[3][1].tolist() == [1] * 6 + [2] * 2
  assert rows[6][1].tolist() == [1] * 2 + [0] * 6
  # By what both names begin with, as Megatron calls it.
  held = _load(tmp_path / "a", packing="packed", held_out=0.5)
  assert _kept(held) == IDS[:30]
  assert held.held_out_text.tokens == 20


def test_ends_and_beginnings_of_text_keep_documents(tmp_path):
  """nanoGPT ends a document with the token that begins modded-nanogpt's."""
  tokenizer = _words(tmp_path)
  ids = [1, 2, 0, 2, 0, 1]
  np.array(ids, np.uint16).tofile(tmp_path / "ends.bin")
  token_files.modded(tmp_path / "begins.bin", ids)
  load = lambda name: _load(
    tmp_path / name, tokenizer=tokenizer, packing="packed", length=6
  ).train[0][1]
  assert load("ends.bin").tolist() == [1, 1, 1, 2, 2, 3]
  assert load("begins.bin").tolist() == [1, 1, 2, 2, 3, 3]


def _words(folder):
  added = dict.fromkeys(
    ("single_word", "lstrip", "rstrip", "normalized"), False
  )
  path = folder / "tokenizer.json"
  path.write_text(
    json.dumps({
      "version": "1.0",
      "added_tokens": [added | {"id": 0, "content": "</s>", "special": True}],
      "pre_tokenizer": {"type": "Whitespace"},
      "model": {
        "type": "WordLevel",
        "vocab": {"</s>": 0, "a": 1, "b": 2},
        "unk_token": "b",
      },
    })
  )
  return str(path)


def test_folders_have_splits(tmp_path):
  for name in ("fineweb_train_000001", "fineweb_val_000000"):
    token_files.modded(tmp_path / f"{name}.bin", IDS)
  with pytest.warns(UserWarning, match="left out: 1 of the split validation"):
    assert _kept(_load(tmp_path)) == IDS
  corpus = _load(
    tmp_path / "*train*.bin", held_out_path=str(tmp_path / "*val*.bin")
  )
  assert len(corpus.held_out) == 7
  assert corpus.held_out_text.tokens == 50


def test_a_mapped_file_is_not_read(tmp_path):
  """A sparse file of 40 GB is opened, and its last row read, at once."""
  with (tmp_path / "a.bin").open("wb") as file:
    file.truncate(40 * 2**30)
  corpus = _load(tmp_path / "a.bin", length=4096)
  assert len(corpus.train) == 5 * 2**20
  assert not corpus.train[len(corpus.train) - 1][0].any()


@pytest.mark.parametrize("cut", ["bin", "idx", "magic", "head"])
def test_an_index_that_does_not_fit(tmp_path, cut):
  token_files.megatron(tmp_path / "a", DOCUMENTS)
  path = tmp_path / ("a.bin" if cut == "bin" else "a.idx")
  held = path.read_bytes()
  short = {"magic": b"x" + held[1:], "head": held[:20]}
  path.write_bytes(short.get(cut, held[:-2]))
  with pytest.raises(ValueError, match="a.idx does not fit .*a.bin") as error:
    _load(tmp_path / "a.bin")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  ("name", "content", "settings", "message"),
  [
    ("a.bin", b"\1\0" * 9 + b"\2", {}, "holds 19 bytes, which are no ids"),
    ("a.bin", b"", {}, "holds 0 bytes"),
    ("a.npy", b"no", {}, "is not a .npy file"),
    ("a.bin", b"\1\0", {"tokenizer": None}, "do not name their tokenizer; set"),
    ("a.bin", b"\1\0", {"tokenizer": "bpe:300"}, "do not name their tokenizer"),
    ("a.bin", b"\1\0", {"held_out": 0.1}, "of so few documents is none"),
  ],
)
def test_bad_files(tmp_path, name, content, settings, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message) as error:
    _load(tmp_path / name, **settings)
  assert "\n" not in str(error.value)


def test_ids_beyond_the_vocabulary(tmp_path):
  np.array([1, 2, 3, 12], np.uint16).tofile(tmp_path / "a.bin")
  iterator = data.train_iterator(
    _load(tmp_path / "a.bin"), batch_size=1, seed=0
  )
  with pytest.raises(ValueError, match="token 3 is 12, beyond the 12 ids"):
    next(iterator)
  iterator.close()


def test_floats_and_short_headers(tmp_path):
  np.save(tmp_path / "a.npy", np.zeros(3))
  with pytest.raises(ValueError, match="holds float64 .*ids are integers"):
    _load(tmp_path / "a.npy")
  path = token_files.modded(tmp_path / "a.bin", IDS)
  (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:-2])
  with pytest.raises(ValueError, match="has 49 ids where its header counts 50"):
    _load(path)


def test_tokens_are_not_text(tmp_path):
  path = token_files.megatron(tmp_path / "a", DOCUMENTS)
  with pytest.raises(
    ValueError, match="holds tokens already; train on it as it is"
  ):
    data.prepare(path, "byte", str(tmp_path / "out"))

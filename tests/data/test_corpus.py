"""Loading what a config names: sides, sizes, tokenizers, bad input."""

import json
import subprocess
import sys

import numpy as np
import pytest

from dllm_jax import data


def _jsonl(path, texts):
  path.write_text("\n".join(json.dumps({"text": t}) for t in texts))
  return str(path)


def test_shakespeare():
  corpus = data.load(data.Dataset())
  assert corpus.tokenizer.vocab_size == 66
  assert corpus.held_out_text.characters == 111540  # The last tenth.
  assert corpus.held_out_text.characters_per_token == 1
  assert corpus.held_out_text.bytes_per_token == 1
  assert (len(corpus.train), len(corpus.held_out)) == (7843, 872)
  tokens, segments, _ = corpus.train[0]
  assert corpus.tokenizer.decode(tokens).startswith("First Citizen:\nBefore")
  assert (segments == 1).all()


def test_documents_end_with_eos(tmp_path):
  tokenizer = _huggingface(tmp_path)
  path = _jsonl(tmp_path / "a.jsonl", ["a b", "b"])
  corpus = data.load(
    data.Dataset(path=path, tokenizer=tokenizer, length=8, held_out=0.0)
  )
  tokens, segments, _ = corpus.train[0]
  assert tokens.tolist() == [1, 2, 0, 2, 0, 0, 0, 0]
  assert segments.tolist() == [1] * 5 + [0] * 3
  assert corpus.held_out is None
  assert corpus.held_out_text is None
  assert not list(data.held_out_batches(corpus, batch_size=2))


def _huggingface(folder):
  words = {"</s>": 0, "a": 1, "b": 2}
  path = folder / "tokenizer.json"
  added = {
    "id": 0,
    "content": "</s>",
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "special": True,
  }
  path.write_text(
    json.dumps({
      "version": "1.0",
      "added_tokens": [added],
      "pre_tokenizer": {"type": "Whitespace"},
      "model": {"type": "WordLevel", "vocab": words, "unk_token": "b"},
    })
  )
  return str(path)


def test_held_out_text_of_its_own(tmp_path):
  (tmp_path / "a.txt").write_text("abcde" * 10)
  (tmp_path / "b.txt").write_text("edcé".replace("é", "a"))
  dataset = data.Dataset(
    path=str(tmp_path / "a.txt"),
    held_out_path=str(tmp_path / "b.txt"),
    length=16,
  )
  corpus = data.load(dataset)
  assert len(corpus.train.tokens) == 50
  [batch] = data.held_out_batches(corpus, batch_size=2)
  assert corpus.tokenizer.decode(batch.tokens[batch.loss_mask]) == "edca"
  (tmp_path / "b.txt").write_text("xyz")
  with pytest.raises(ValueError, match="b.txt: character 'x' at position 0"):
    data.load(dataset)
  (tmp_path / "b.txt").write_text("")
  with pytest.raises(ValueError, match="b.txt is empty"):
    data.load(dataset)


def test_a_run_reuses_its_tokenizer(tmp_path):
  (tmp_path / "a.txt").write_text("abc" * 9)
  own = data.Characters("abcdef")
  dataset = data.Dataset(path=str(tmp_path / "a.txt"))
  assert data.load(dataset, tokenizer=own).tokenizer == own
  with pytest.raises(ValueError, match="a.txt: character 'a' at position 0"):
    data.load(dataset, tokenizer=data.Characters("bc"))


def test_byte_pairs_are_learned_from_the_training_text_alone(tmp_path):
  """What is held out has no say, whichever way it is held out."""
  train, held_out = "the cat sat on the mat\n" * 45, "zxqzxqzxq zxqzxqzxq\n" * 6
  (tmp_path / "a.txt").write_text(train + held_out)
  (tmp_path / "train.txt").write_text(train)
  (tmp_path / "other.txt").write_text(held_out)
  share = len(held_out) / len(train + held_out)
  path = lambda name: str(tmp_path / name)
  whole, apart = (
    data.load(data.Dataset(tokenizer="bpe:265", length=8, **fields))
    for fields in (
      {"path": path("a.txt"), "held_out": share},
      {"path": path("train.txt"), "held_out_path": path("other.txt")},
    )
  )
  assert whole.tokenizer == apart.tokenizer
  # A run that goes on has its own, whatever became of the text.
  other = data.Dataset(path=path("other.txt"), tokenizer="bpe:265", length=8)
  again = data.load(other, tokenizer=whole.tokenizer)
  assert again.tokenizer == whole.tokenizer
  assert len(whole.tokenizer.encode(" cat")) < 4
  assert len(whole.tokenizer.encode("zxq")) == 3
  # Bits per character divide by characters, whatever a token stands for.
  assert whole.held_out_text == apart.held_out_text
  assert whole.held_out_text.characters == len(held_out)
  assert whole.held_out_text.tokens == len(whole.tokenizer.encode(held_out))
  assert whole.held_out_text.tokens == len(whole.held_out.tokens)


def test_prepared_byte_pairs(tmp_path):
  text = "the cat sat on the mat\n" * 45 + "zxqzxqzxq\n" * 11
  (tmp_path / "a.txt").write_text(text)
  output = str(tmp_path / "prepared")
  data.prepare(str(tmp_path / "a.txt"), "bpe:265", output, length=16, workers=1)
  memory, disk = (
    data.load(data.Dataset(path=path, tokenizer="bpe:265", length=16))
    for path in (str(tmp_path / "a.txt"), output)
  )
  assert memory.tokenizer == disk.tokenizer
  assert memory.held_out_text == disk.held_out_text
  np.testing.assert_array_equal(memory.train[1][0], disk.train[1][0])
  with pytest.raises(ValueError, match="was prepared with another tokenizer"):
    data.load(data.Dataset(path=output, tokenizer="bpe:264", length=16))


def test_text_shorter_than_a_row_is_padded(tmp_path):
  (tmp_path / "a.txt").write_text("ten letter")
  corpus = data.load(data.Dataset(path=str(tmp_path / "a.txt"), length=64))
  iterator = data.train_iterator(corpus, batch_size=2, seed=0)
  batch = next(iterator)
  iterator.close()
  np.testing.assert_array_equal(batch.loss_mask.sum(axis=1), [9, 9])


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.txt", b"", "a.txt is empty; give a file"),
    ("a.txt", b" \n", "a.txt is empty; give a file"),
    ("a.jsonl", b"", "a.jsonl is empty"),
    ("a.txt", b"\xff\xfe\x00", "a.txt is not UTF-8 text"),
    ("a.jsonl", b'{"text": "a"}', "held_out 0.01 of so few documents"),
  ],
)
@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_bad_text(tmp_path, name, content, message, tokenizer):
  (tmp_path / name).write_bytes(content)
  dataset = data.Dataset(
    path=str(tmp_path / name), tokenizer=tokenizer, held_out=0.01
  )
  with pytest.raises(ValueError, match=message) as error:
    data.load(dataset)
  assert "\n" not in str(error.value)


def test_bad_paths_and_settings():
  with pytest.raises(FileNotFoundError, match="'nowhere.txt' does not exist"):
    data.load(data.Dataset(path="nowhere.txt"))
  with pytest.raises(ValueError, match="virtual_shards is 0"):
    data.Dataset(virtual_shards=0)
  with pytest.raises(ValueError, match="legal are 'slices'"):
    data.Dataset(packing="other")


def test_importing_is_light():
  """Tokenising processes must start without jax, and users without grain."""
  code = (
    "import sys, dllm_jax, dllm_jax.data.record;"
    "assert not {'jax', 'grain', 'tokenizers', 'pyarrow'} & set(sys.modules)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
  assert set(dir(data)) >= set(data.__all__)
  assert all(getattr(data, name) for name in data.__all__)

"""Tokenizers: there and back, their own mask, and bad input."""

import json
import subprocess
import sys
import types

import numpy as np
import pytest
import tokenizers

from dllm_jax.data import tokenizer as tokenizer_lib
from dllm_jax.data import tokenizer_json

TEXT = "To be, or not to be: that is the question.\nÄé 漢 🎉 to be <s>"


def _save(path, special=("<s>", "</s>"), **config):
  """Writes a small byte-level BPE tokenizer.json."""
  trained = tokenizers.Tokenizer(tokenizers.models.BPE())
  level = tokenizers.pre_tokenizers.ByteLevel
  trained.pre_tokenizer = level(add_prefix_space=False)
  trained.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=list(special),
    initial_alphabet=level.alphabet(),
    show_progress=False,
  )
  trained.train_from_iterator([TEXT] * 3, trainer)
  trained.enable_truncation(4)
  trained.save(str(path / "tokenizer.json"))
  if config:
    (path / "tokenizer_config.json").write_text(json.dumps(config))
  return str(path / "tokenizer.json")


@pytest.fixture(params=["char", "byte", "huggingface", "bpe:280"])
def tokenizer(request, tmp_path):
  name = _save(tmp_path) if request.param == "huggingface" else request.param
  return tokenizer_lib.make_tokenizer(name, [TEXT], training_texts=[TEXT])


def test_round_trip(tokenizer):
  ids = tokenizer.encode(TEXT)
  assert ids.dtype == np.int32
  assert ids.ndim == 1
  # Special tokens, which a text may name, are left out of what is decoded.
  special = (
    isinstance(tokenizer, tokenizer_lib.HuggingFace) and tokenizer.eos_id
  )
  text = TEXT.removesuffix("<s>") if special else TEXT
  assert tokenizer.decode(ids) == text
  assert tokenizer.encode("").shape == (0,)
  assert tokenizer.decode([]) == ""


def test_the_mask_is_the_last_id_and_no_text(tokenizer):
  assert tokenizer.mask_id == tokenizer.vocab_size - 1
  ids = tokenizer.encode(TEXT)
  assert ids.max() < tokenizer.mask_id
  masked = np.concatenate([ids[:6], [tokenizer.mask_id] * 2, ids[6:]])
  head, tail = tokenizer.decode(ids[:6]), tokenizer.decode(ids[6:])
  assert tokenizer.decode(masked) == head + "▁▁" + tail
  assert tokenizer.decode(masked, mask="[MASK]") == head + "[MASK]" * 2 + tail


def test_json_round_trip(tokenizer):
  again = tokenizer_lib.tokenizer_from_json(tokenizer.to_json())
  assert again == tokenizer
  assert again.vocab_size == tokenizer.vocab_size
  assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


def test_ids_outside_the_vocabulary(tokenizer):
  for bad in (-1, tokenizer.vocab_size):
    with pytest.raises(ValueError, match=f"token id {bad} is not in the voc"):
      tokenizer.decode([0, bad])


def test_character_ids_are_ordered_and_unknown_ones_named():
  tokenizer = tokenizer_lib.characters(["cab", "ad"])
  assert tokenizer.vocabulary == "abcd"
  assert tokenizer.vocab_size == 5
  assert tokenizer.encode("dab").tolist() == [3, 0, 1]
  with pytest.raises(ValueError, match="character 'é' at position 2 is not"):
    tokenizer.encode("abéz")
  with pytest.raises(ValueError, match="text.txt is empty"):
    tokenizer_lib.characters([""], "text.txt")


def test_bytes_that_are_not_utf8():
  assert tokenizer_lib.Bytes().decode([0x61, 0xFF]) == "a\ufffd"


def test_huggingface_roles(tmp_path):
  tokenizer = tokenizer_lib.huggingface(_save(tmp_path))
  assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, None)
  # The name of a special token in a text is that token, as in transformers.
  assert tokenizer.bos_id in tokenizer.encode("a <s> b")
  assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eos_id]) == "a"


def test_huggingface_named_masks(tmp_path):
  file = _save(tmp_path, special=("<s>", "[MASK]"))
  size = tokenizers.Tokenizer.from_file(file).get_vocab_size()
  appended = tokenizer_lib.huggingface(file)
  assert (appended.mask_id, appended.vocab_size) == (size, size + 1)
  named = tokenizer_lib.huggingface(file, mask_token="[MASK]")
  assert (named.mask_id, named.vocab_size) == (1, size)
  assert 1 not in named.encode("a [MASK] b")
  with pytest.raises(ValueError, match="has no mask token '<mask>'"):
    tokenizer_lib.huggingface(file, mask_token="<mask>")
  # A mask that ordinary text reaches is refused: it would look masked.
  ordinary = tokenizer_lib.huggingface(file, mask_token="b")
  with pytest.raises(ValueError, match="contains the mask token 'b'"):
    ordinary.encode("b")


def test_huggingface_config_beside(tmp_path):
  file = _save(
    tmp_path,
    special=("<m>", "<e>", "</s>"),
    mask_token={"content": "<m>"},
    eos_token="<e>",
  )
  for path in (file, str(tmp_path)):
    tokenizer = tokenizer_lib.huggingface(path)
    assert (tokenizer.mask_id, tokenizer.eos_id) == (0, 1)


def _sentencepiece(path):
  """Writes byte pairs over spaces that are letters, one put before the text."""
  made = tokenizers.Tokenizer(tokenizers.models.BPE())
  space = {"replacement": "▁", "prepend_scheme": "first", "split": False}
  made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(**space)
  made.decoder = tokenizers.decoders.Metaspace(
    replacement="▁", prepend_scheme="first"
  )
  made.normalizer = tokenizers.normalizers.NFC()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=90, show_progress=False, special_tokens=["<s>", "</s>"]
  )
  made.train_from_iterator([TEXT] * 4, trainer)
  made.save(str(path / "tokenizer.json"))
  return str(path / "tokenizer.json")


# What pieces of a text get alone is another thing: a space before each (prepend
# scheme "first"), a letter and its accent in two, the middle of a line cut.
@pytest.mark.parametrize("make", [_save, _sentencepiece])
@pytest.mark.parametrize(
  "text",
  [
    "to be\n" * 400,
    " not to be: that is" * 200,  # One line.
    "be e\u0301 or \u6f22 " * 200,  # An accent of its own.
    "x" * 3000,
  ],
  ids=["lines", "line", "accents", "letters"],
)
def test_a_long_text_gets_the_ids_of_the_whole(
  make, text, tmp_path, monkeypatch
):
  tokenizer = tokenizer_lib.huggingface(make(tmp_path))
  whole = tokenizer.encode(text)
  monkeypatch.setattr(tokenizer_json, "_WINDOW", 1000)
  monkeypatch.setattr(tokenizer_json, "_MARGIN", 100)
  monkeypatch.setattr(tokenizer_json, "_AGREED", 8)
  calls = []
  windows = tokenizer_json._windows
  monkeypatch.setattr(
    tokenizer_json, "_windows", lambda *a: calls.append(a[2]) or windows(*a)
  )
  np.testing.assert_array_equal(tokenizer.encode(text), whole)
  assert calls[0] == 100


def test_windows_are_joined_where_a_run_of_tokens_agrees(monkeypatch):
  monkeypatch.setattr(tokenizer_json, "_AGREED", 4)

  def window(low, *tokens):
    """Returns a window of tokens that begin at `low` and have `size` letters."""
    ends = np.cumsum([size for _, size in tokens])
    spans = [(int(e) - size, int(e)) for e, (_, size) in zip(ends, tokens)]
    encoding = types.SimpleNamespace(ids=[i for i, _ in tokens], offsets=spans)
    return tokenizer_json._Window(encoding, low)

  one = [(i, 2) for i in range(10)]  # At 0, 2, ... 18.
  here = window(0, *one)
  # The same tokens from the third on, behind three that only this window has.
  late = window(3, (90, 1), (91, 1), (92, 1), *one[3:])
  mine, theirs = here.join(late, 12, 12)
  assert here.ids[mine] == late.ids[theirs] and theirs == mine
  late = window(5, (90, 1), *one[3:])
  mine, theirs = here.join(late, 12, 12)
  assert here.ids[mine] == late.ids[theirs] and theirs == mine - 2
  # One token that agrees is chance, and so are equal ones at other places.
  chance = [(50 + i, 2) for i in range(10)]
  chance[5] = one[5]
  assert here.join(window(0, *chance), 10, 12) is None
  assert here.join(window(1, *one), 10, 12) is None


_LEARN = """
from dllm_jax.data import source, tokenizer
[text] = source.training_texts(source.find("shakespeare"), source.Format(), 0.1)
print(tokenizer.make_tokenizer("bpe:512", [], training_texts=[text]).to_json())
"""


@pytest.mark.all
def test_learned_byte_pairs():
  """Two processes, which hash differently, learn the same, for any text."""
  first, second = (
    subprocess.run(
      [sys.executable, "-c", _LEARN],
      capture_output=True,
      check=True,
      text=True,
    ).stdout
    for _ in range(2)
  )
  assert first == second
  learned = tokenizer_lib.tokenizer_from_json(first)
  assert (learned.vocab_size, learned.mask_id) == (512, 511)
  assert (learned.bos_id, learned.eos_id, learned.pad_id) == (None,) * 3
  for text in (TEXT, "  a \r\n\n\tb  ", "<mask> \x00", "ROMEO:\nO, 'tis"):
    assert learned.decode(learned.encode(text)) == text
  # A prompt is cut as the text is, and a word keeps the space before it.
  whole = learned.encode("ROMEO:\nWhat, ho!").tolist()
  for text in ("ROMEO:", "ROMEO:\n", "ROMEO:\nWhat,"):
    prompt = learned.encode(text).tolist()
    assert whole[: len(prompt)] == prompt
  assert len(learned.encode(" the")) == 1


def test_bad_byte_pairs():
  for name in ("bpe:", "bpe:x", "bpe:257", "bpe:-300", "bpe:3e3", "bpe:²⁵⁹"):
    with pytest.raises(ValueError, match="must be bpe:N, with N at least 258"):
      tokenizer_lib.make_tokenizer(name, [], training_texts=[TEXT])
  for text in ("", "a"):
    with pytest.raises(ValueError, match="here is too short to learn byte"):
      tokenizer_lib.make_tokenizer(
        "bpe:300", [], training_texts=[text], path="here"
      )
  with pytest.raises(ValueError, match="here has pairs for no more than bpe:2"):
    tokenizer_lib.make_tokenizer(
      "bpe:999", [], training_texts=[TEXT], path="here"
    )
  with pytest.raises(ValueError, match="mask_token must be None"):
    tokenizer_lib.make_tokenizer("bpe:300", [], mask_token="x")


def test_bad_tokenizers(tmp_path):
  with pytest.raises(FileNotFoundError, match="legal are 'char', 'byte', "):
    tokenizer_lib.make_tokenizer("chars", [])
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match="is not a tokenizer.json"):
    tokenizer_lib.make_tokenizer(str(tmp_path), [])
  with pytest.raises(ValueError, match="mask_token must be None"):
    tokenizer_lib.make_tokenizer("byte", [], mask_token="x")
  for text in ("no", "[]", '{"kind": "other"}', '{"kind": "byte", "a": 1}'):
    with pytest.raises(ValueError, match="not a saved tokenizer"):
      tokenizer_lib.tokenizer_from_json(text)

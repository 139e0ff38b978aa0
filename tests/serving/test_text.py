"""Text of tokens as they come: characters are whole, stops are exact."""

import json
import random

import pytest

from dllm_jax.data.byte_pairs import learn
from dllm_jax.data.huggingface import HuggingFace
from dllm_jax.data.numbers import Numbers
from dllm_jax.data.tokenizer import Bytes, Characters
from dllm_jax.evaluation.likelihood.contexts import cut
from dllm_jax.sampling.constraints.spelling import spelling
from dllm_jax.serving.http.text import Detokenizer, Stops

TEXT = "naïve café – 日本語のテキスト, 🙂👩‍👩‍👧 don't 'e ! Wörter\n" * 3


def byte_pairs() -> HuggingFace:
  return HuggingFace(definition=learn([TEXT], 300), mask_id=300)


def with_fallback() -> HuggingFace:
  """Byte pairs as LLaMA has them: words marked, bytes where none is known."""
  import tokenizers
  from tokenizers import decoders, models, normalizers

  names = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdetfé"]
  vocabulary = {name: i for i, name in enumerate([*names, "▁d", "▁c"])}
  merges = [("▁", "d"), ("▁", "c")]
  made = tokenizers.Tokenizer(
    models.BPE(
      vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
  )
  made.normalizer = normalizers.Sequence([
    normalizers.Prepend("▁"),
    normalizers.Replace(" ", "▁"),
  ])
  made.decoder = decoders.Sequence([
    decoders.Replace("▁", " "),
    decoders.ByteFallback(),
    decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
  ])
  return HuggingFace(definition=made.to_str(), mask_id=len(vocabulary))


def tidy() -> HuggingFace:
  """Words and their parts, between which spaces are left out."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers

  words = ["[UNK]", "do", "n", "'", "t", "##e", ".", "!", "s", "m", "we", "re"]
  vocabulary = {word: i for i, word in enumerate(words)}
  made = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
  made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  made.decoder = decoders.WordPiece(cleanup=False)
  return HuggingFace(
    definition=made.to_str(), mask_id=len(words), tidies_spaces=True
  )


TOKENIZERS = {
  "characters": Characters("".join(sorted(set(TEXT)))),
  "bytes": Bytes(),
  "numbers": Numbers(vocab_size=40, mask_id=39),
  "byte pairs": byte_pairs(),
  "fallback": with_fallback(),
  "tidy": tidy(),
}


def rows(tokenizer, count: int = 60):
  """Yields rows of ids: a text's, and random ones, which break characters."""
  draw = random.Random(0)
  ids = [i for i in range(tokenizer.vocab_size) if i != tokenizer.mask_id]
  if not isinstance(tokenizer, Numbers):
    yield [int(i) for i in tokenizer.encode(TEXT)]
  for _ in range(count):
    yield draw.choices(ids, k=draw.randrange(120))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_the_text(name):
  tokenizer, draw = TOKENIZERS[name], random.Random(1)
  for row in rows(tokenizer):
    made, pieces, at = Detokenizer(tokenizer), [], 0
    while at < len(row):
      step = draw.choice((1, 1, 2, 7))
      pieces.append(made.add(row[at : at + step]))
      at += step
    pieces.append(made.finish())
    assert "".join(pieces) == tokenizer.decode(row)


def test_characters_come_whole_and_as_soon_as_they_are():
  made = Detokenizer(Bytes())
  pieces = [made.add([byte]) for byte in "aé日🙂".encode()]
  assert pieces == ["a", "", "é", "", "", "日", "", "", "", "🙂"]
  assert made.add([0xE2]) == "" and made.finish() == "\ufffd"


def test_text_goes_on_from_a_prompt():
  tokenizer = TOKENIZERS["fallback"]
  prompt = [int(i) for i in tokenizer.prompt("ab")]
  made = Detokenizer(tokenizer, prompt)
  assert made.add([int(i) for i in tokenizer.encode("d")]) == " d"
  halves = "é".encode()
  made = Detokenizer(Bytes(), halves[:1])
  assert made.add([halves[1]]) == "é"


@pytest.mark.parametrize("name", ["byte pairs", "fallback"])
def test_tokens_are_spelled_in_bytes(name):
  tokenizer = TOKENIZERS[name]
  ids = [int(i) for i in tokenizer.encode("café 日本")]
  whole = b"".join(map(spelling(tokenizer).bytes_of, ids))
  assert whole.decode().strip() == "café 日本"


def test_a_stop_is_found_wherever_pieces_end():
  draw = random.Random(2)
  for _ in range(3000):
    text = "".join(draw.choices("abc", k=draw.randrange(14)))
    strings = [
      "".join(draw.choices("abc", k=draw.randrange(1, 5)))
      for _ in range(draw.randrange(5))
    ]
    stops, given, at = Stops(strings), "", 0
    while at < len(text) and not stops.found:
      step = draw.randrange(1, 4)
      given += stops.add(text[at : at + step])
      at += step
      assert cut(text, strings).startswith(given)
    given += stops.add("", last=True)
    assert given == cut(text, strings)
    assert stops.found == any(stop in text for stop in strings)


def test_text_is_held_no_longer_than_a_stop_may_begin_in_it():
  stops = Stops(["\nUser:"])
  assert stops.add("So\n") == "So" and stops.add("Us") == ""
  assert stops.add("e it") == "\nUse it"


def test_definitions_are_read_once():
  tokenizer = TOKENIZERS["byte pairs"]
  assert spelling(tokenizer) is spelling(tokenizer)
  assert json.loads(tokenizer.definition)["decoder"]["type"] == "ByteLevel"

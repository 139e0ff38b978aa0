"""Words that are spelled once: the ids are those of whole documents."""

import json
import pathlib
import random

import numpy as np
import pytest

from dllm_jax.data import byte_pairs, source
from dllm_jax.data import packing as packing_lib
from dllm_jax.data import tokenizer as tokenizer_lib
from dllm_jax.data.huggingface import HuggingFace
from dllm_jax.data.prepared import encoder
from tests.quick import long

CORPUS = pathlib.Path(source.corpora()["shakespeare"]).read_text("utf-8")[
  :60_000
]
LLAMA3 = byte_pairs.QWEN_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
KINDS = {
  "gpt2": (None, None),
  "ours": (byte_pairs._WORDS, None),
  "qwen2": (byte_pairs.QWEN_WORDS, "NFC"),
  "llama3": (LLAMA3, None),
}
# What regular expressions, normalisation and added tokens stumble over.
ATOMS = [
  *("a", "the", "The", "don", "word", "s", "'s", "'S", "'ll", "'re", "’s"),
  *(
    " ",
    " ",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\r\n",
    "\t",
    " \n ",
    "\u00a0",
    "\u3000",
  ),
  *(".", ",", "...", "(", ")", "-", "_", "$", "<", "<|end|>", "<|", "|>"),
  *("1", "23", "4567", "½", "²", "Ⅷ", "٣", "é", "e\u0301", "\u0301", "ß", "ﬁ"),
  *(
    "中文",
    "日本",
    "한",
    "ї",
    "א",
    "\u200d",
    "👩\u200d👧",
    "\0",
    "İ",
    "\u2028",
  ),
]


def _tokenizer(kind: str, mask: str | None = None) -> HuggingFace:
  from tokenizers import (
    AddedToken,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
  )

  words, normalizer = KINDS[kind]
  made = byte_pairs.byte_level(models.BPE(), words)
  if normalizer:
    made.normalizer = getattr(normalizers, normalizer)()
  trainer = trainers.BpeTrainer(
    vocab_size=600,
    show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
  )
  made.train_from_iterator([CORPUS, " ".join(ATOMS) * 20], trainer)
  made.add_special_tokens([AddedToken("<|end|>", normalized=False)])
  size = made.get_vocab_size()
  mask_id = size if mask is None else made.token_to_id(mask)
  return HuggingFace(definition=made.to_str(), mask_id=mask_id, eos_id=1)


def _same(tokenizer, texts):
  documents = [source.Document(text, "here") for text in texts]
  encode = encoder.Encoder(tokenizer)
  assert isinstance(encode._encode_batch, encoder.Words)
  for _ in range(2):  # Spelled, and looked up.
    for document, found in zip(documents, encode(documents), strict=True):
      right = packing_lib.tokenise(document.text, "here", tokenizer)
      np.testing.assert_array_equal(found, right, repr(document.text))
      assert found.dtype == np.int32


@pytest.mark.parametrize(
  "kind", ["llama3", *(long(kind) for kind in KINDS if kind != "llama3")]
)
def test_ids_are_those_of_whole_documents(kind):
  rng = random.Random(kind)
  texts = [
    "".join(rng.choices(ATOMS, k=rng.randint(0, 12))) for _ in range(3000)
  ]
  _same(_tokenizer(kind), [*texts, CORPUS, "", " ", " a"])


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_a_text_with_the_masks_name(kind):
  tokenizer = _tokenizer(kind, mask="<|end|>")
  _same(tokenizer, ["a <|end|> b", " the<|end|>", "<|end|> the"])


def test_memory_is_bounded(monkeypatch):
  monkeypatch.setattr(encoder, "_KEPT", 50)
  monkeypatch.setattr(encoder, "_LONG", 40)
  tokenizer = _tokenizer("gpt2")
  encode = encoder.Encoder(tokenizer)
  lines = [*CORPUS.split("\n\n"), "x" * 300, "中" * 300 + " word"]
  for i in range(0, len(lines), 3):
    documents = [source.Document(line, "") for line in lines[i : i + 3]]
    for document, found in zip(documents, encode(documents), strict=True):
      right = packing_lib.tokenise(document.text, "", tokenizer)
      np.testing.assert_array_equal(found, right)
    assert len(encode._encode_batch._known) <= 50
    assert max(map(len, encode._encode_batch._known)) <= 24


def _changed(**fields):
  definition = json.loads(_tokenizer("qwen2").definition)
  for path, value in fields.items():
    at = definition
    *keys, last = path.split("__")
    for key in keys:
      at = at[int(key) if key.isdigit() else key]
    at[last] = value
  return HuggingFace(definition=json.dumps(definition), mask_id=0)


@pytest.mark.parametrize(
  "fields",
  [
    {"pre_tokenizer__pretokenizers__0__pattern": {"Regex": r"\s+|\S+"}},
    {"pre_tokenizer__pretokenizers__0__behavior": "Removed"},
    {"pre_tokenizer__pretokenizers__1__add_prefix_space": True},
    {"normalizer": {"type": "NFKC"}},
    {"normalizer": {"type": "Lowercase"}},
    {"model__dropout": 0.1},
    {"added_tokens__0__content": "<a word>"},
    {"added_tokens__0__content": "word>"},
    {"added_tokens__0__content": "< "},
    {"added_tokens__0__lstrip": True},
    {"added_tokens__0__single_word": True},
  ],
)
@pytest.mark.few(4)
def test_what_cuts_otherwise_spells_whole_documents(fields):
  assert encoder._is_cut_at_words(_changed())
  assert not encoder._is_cut_at_words(_changed(**fields))


def test_other_tokenizers_spell_whole_documents():
  encode = encoder.Encoder(tokenizer_lib.Bytes())
  [ids] = encode([source.Document("a b", "")])
  assert ids.tolist() == [97, 32, 98]


def test_a_text_that_cannot_be_encoded_is_named():
  encode = encoder.Encoder(_tokenizer("gpt2"))
  with pytest.raises(ValueError, match=r"here\.txt: a text has half"):
    encode([
      source.Document("a", "a.txt"),
      source.Document("\ud800", "here.txt"),
    ])

"""Rows against the original's builders: `golden/mmada_prompting`."""

import numpy as np
import pytest

from dllm_jax.core.images import ImageVocabulary
from dllm_jax.data.images import Sequences
from tests import golden_cases

CASE = golden_cases.load("mmada_prompting")


@pytest.fixture(scope="module")
def build():
  said = CASE.config
  mapped = said["reserved_token_mapping"]
  special = said["tokenizer"]["special"]
  vocabulary = ImageVocabulary(
    tokens=said["num_vq_tokens"], codes=said["codebook_size"]
  )
  # The published ids are the defaults.
  assert vocabulary.offset == said["image_offset"]
  assert vocabulary.begin == said["tokenizer"]["bos_token_id"]
  assert vocabulary.end == said["tokenizer"]["eos_token_id"]
  assert vocabulary.end_header == special["<|end_header_id|>"]
  marks = {
    "<|soi|>": vocabulary.start_image,
    "<|eoi|>": vocabulary.end_image,
    "<|t2i|>": vocabulary.to_image,
    "<|mmu|>": vocabulary.understand,
    "[iPAD]": vocabulary.pad,
    "<|r2i|>": vocabulary.reason,
  }
  assert marks == {name: mapped[name] for name in marks}
  made = Sequences(vocabulary=vocabulary, length=said["max_seq_len"])
  assert made.room == said["max_text_len"]
  return made


def texts(name):
  lengths = CASE.arrays[f"{name}_text_lengths"]
  rows = CASE.arrays[f"{name}_text_ids"]
  return [row[:n] for row, n in zip(rows, lengths, strict=True)]


def stacked(rows):
  return (np.stack(part) for part in zip(*rows, strict=True))


def test_pictures_to_draw(build):
  a = CASE.arrays
  rows = zip(texts("t2i"), a["t2i_codes"], strict=True)
  tokens, counts = stacked([build.to_image(t, c) for t, c in rows])
  # The original has masked and emptied some: where it did not, ids are equal.
  kept = a["t2i_uniform_drop"] >= CASE.config["cond_dropout_prob"]
  image = build.vocabulary.is_code(tokens)
  np.testing.assert_array_equal(
    tokens[kept][:, : build.room + 2],
    a["t2i_input_ids"][kept][:, : build.room + 2],
  )
  empty = [*build.vocabulary.empty_prompt(build.length)]
  assert (a["t2i_input_ids"][~kept][:, : build.room + 1] == empty).all()
  assert (
    tokens[image] == a["t2i_codes"].ravel() + build.vocabulary.offset
  ).all()
  attention = np.where(kept[:, None], tokens, a["t2i_input_ids"])
  np.testing.assert_array_equal(
    attention != build.vocabulary.pad, a["t2i_attention_mask"] > 0
  )
  counted = (a["t2i_labels"] != -100) & (np.arange(build.length) > build.room)
  masked = a["t2i_input_ids"] == CASE.config["tokenizer"]["mask_token_id"]
  np.testing.assert_array_equal(counts & (masked | ~image), counted)
  np.testing.assert_array_equal(tokens[counted], a["t2i_labels"][counted])


def test_prompts(build):
  mask = CASE.config["tokenizer"]["mask_token_id"]
  for name in ("t2i_gen", "t2i_uncond"):
    expected = CASE.arrays[f"{name}_input_ids"]
    given = texts(name) if name == "t2i_gen" else [[]] * len(expected)
    for text, row in zip(given, expected, strict=True):
      made = [mask if i is None else i for i in build.canvas(text)]
      np.testing.assert_array_equal(made, row)


@pytest.mark.parametrize("name", ["lm", "lm_chat", "mmu", "r2i"])
def test_texts(build, name):
  a = CASE.arrays
  make = {
    "lm": build.text,
    "lm_chat": build.chat,
    "mmu": build.understand,
    "r2i": build.reason,
  }[name]
  rows = [texts(name)]
  if name in ("mmu", "r2i"):
    rows.append(a[f"{name}_codes"])
  tokens, counts = stacked([make(*row) for row in zip(*rows, strict=True)])
  np.testing.assert_array_equal(tokens, a[f"{name}_input_ids"])
  if name == "lm":
    assert counts.all() and (a["lm_attention_mask"] == 1).all()
  else:
    np.testing.assert_array_equal(~counts, a[f"{name}_prompt_mask"] > 0)


def test_questions(build):
  for j, codes in enumerate(CASE.arrays["mmu_gen_codes"]):
    text = CASE.arrays[f"mmu_gen{j}_text_ids"][0]
    row = [*build.picture(codes), *text]
    np.testing.assert_array_equal(row, CASE.arrays[f"mmu_gen{j}_input_ids"][0])


def test_rows_without_room():
  with pytest.raises(ValueError, match="raise data.length"):
    Sequences(vocabulary=ImageVocabulary(tokens=9), length=13)
  with pytest.raises(ValueError, match="9 tokens here, not 4"):
    Sequences(vocabulary=ImageVocabulary(tokens=9), length=20).picture([0] * 4)

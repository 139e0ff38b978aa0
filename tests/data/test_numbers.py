"""Tokens by their numbers."""

import numpy as np
import pytest

from dllm_jax import data
from dllm_jax.data import tokenizer_from_json
from dllm_jax.data.numbers import Numbers

NUMBERS = Numbers(vocab_size=10, mask_id=9, eos_id=0)


def test_round_trip():
  ids = NUMBERS.encode("1 2\n8")
  np.testing.assert_array_equal(ids, [1, 2, 8])
  assert NUMBERS.decode([1, 9, 8]) == "1 ▁ 8"
  assert tokenizer_from_json(NUMBERS.to_json()) == NUMBERS


@pytest.mark.parametrize("text", ["10", "9", "-1", "x", "1.5", "²"])
def test_what_is_no_token(text):
  with pytest.raises(ValueError, match="numbers from 0 to 9"):
    NUMBERS.encode(text)
  with pytest.raises(ValueError, match="legal ids are 0 to 9"):
    NUMBERS.decode([10])


def test_random_rows_are_functions_of_their_index():
  dataset = data.Dataset(
    path="random", tokenizer="numbers:20", length=64, held_out=0.0
  )
  rows, again = (data.load(dataset).train for _ in range(2))
  np.testing.assert_array_equal(rows[5][0], again[5][0])
  assert (rows[5][0] != rows[6][0]).any()
  seen = np.unique(np.concatenate([rows[i][0] for i in range(20)]))
  assert seen.tolist() == list(range(19))  # the mask, 19, is none of them
  with pytest.raises(ValueError, match="numbers:N"):
    data.load(data.Dataset(path="random"))

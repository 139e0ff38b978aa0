"""Tokens by their numbers."""

import numpy as np
import pytest

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

"""Rows of a fixed length: segments, positions, padding."""

import numpy as np
import pytest

from dllm_jax.data import packing, source
from dllm_jax.data import tokenizer as tokenizer_lib

DOCUMENTS = [np.array(d) for d in ([1, 1, 1], [2] * 5, [], [3, 3])]


def _rows(mode):
  rows = packing.Rows(DOCUMENTS, length=4, packing=mode)
  return packing.stack([rows[i] for i in range(len(rows))])[:2]


def test_packed_documents_are_segments_from_one():
  tokens, segments = _rows("packed")
  assert tokens.tolist() == [[1, 1, 1, 2], [2, 2, 2, 2], [3, 3, 0, 0]]
  assert segments.tolist() == [[1, 1, 1, 2], [1, 1, 1, 1], [1, 1, 0, 0]]
  assert tokens.dtype == segments.dtype == np.int32


def test_slices_are_one_segment_each():
  tokens, segments = _rows("slices")
  assert tokens.tolist() == [[1, 1, 1, 2], [2, 2, 2, 2], [3, 3, 0, 0]]
  assert segments.tolist() == [[1] * 4, [1] * 4, [1, 1, 0, 0]]


def test_positions_restart_in_each_segment():
  segments = np.array([[1, 1, 2, 2, 2], [1, 2, 3, 0, 0], [0] * 5, [1] * 5])
  assert packing.positions(segments).tolist() == [
    [0, 1, 0, 1, 2],
    [0, 0, 0, 0, 0],
    [0] * 5,
    [0, 1, 2, 3, 4],
  ]


def test_counter_counts_both_sides():
  count = packing.Counter(tokenizer_lib.Bytes(), 0.5)
  assert count(source.Document(" \n", "a.txt", running=True)) == (None, None)
  train, held_out = count(source.Document("abéd", "a.txt", running=True))
  assert (len(train), len(held_out)) == (2, 3)
  assert (count.documents, count.empty) == (1, 1)
  assert count.held_out == packing.TextSize(tokens=3, characters=2, bytes=3)
  assert count.held_out.characters_per_token == pytest.approx(2 / 3)
  assert count.held_out.bytes_per_token == 1


@pytest.mark.parametrize(
  ("mode", "length", "held_out", "message"),
  [
    ("split", 4, 0.1, "legal are 'slices'"),
    ("slices", 0, 0.1, "at least one token"),
    ("slices", 4, 1.0, "fraction from 0"),
    ("slices", 4, -0.1, "fraction from 0"),
  ],
)
def test_bad_settings(mode, length, held_out, message):
  with pytest.raises(ValueError, match=message):
    packing.check(mode, length, held_out)

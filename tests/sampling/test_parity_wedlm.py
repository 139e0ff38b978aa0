"""WeDLM's other generator: blocks that are appended, not a window."""

import numpy as np
import pytest

from dllm_jax.sampling.policies.processors import Temperature
from dllm_jax.sampling.policies.selection import Threshold
from dllm_jax.sampling.policies.unmasking import Unmasking
from tests import golden_cases, quick
from tests.sampling import published

BLOCKS = golden_cases.load("wedlm").config["blocks"]


@pytest.mark.parametrize("i", [quick.long(i) for i in range(len(BLOCKS))])
def test_blocks_are_appended(i):
  case, run = golden_cases.load("wedlm"), BLOCKS[i]
  (prompt,) = published.prompts(case.arrays[f"block{i}_prompt"][None])
  block = run["block_size"]
  got = published.run(
    "wedlm",
    [prompt + [None] * run["max_new_tokens"]],
    policy=lambda objective: Unmasking(
      objective=objective,
      steps=block,
      # Theirs decides the best mask at a threshold of 0, and no other.
      selection=Threshold(value=run["confidence_threshold"] or 1.0),
      filters=(Temperature(run["temperature"]),),
      processors=(Temperature(0.0),),
    ),
    block_length=block,
    extend=True,
  )
  output = case.arrays[f"block{i}_output"]
  np.testing.assert_array_equal(got.tokens[0], output)
  # Each call is given its canvas in another order, each token at its place.
  inputs, places = (
    case.arrays[f"block{i}_{k}"] for k in ("inputs", "positions")
  )
  history = published.history(got, 0)
  assert len(history) == len(inputs) + 1
  for canvas, tokens, at in zip(history, inputs, places, strict=False):
    there = tokens >= 0
    np.testing.assert_array_equal(canvas[at[there]], tokens[there])

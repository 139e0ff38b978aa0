"""Blocks that are read both ways, and kept as they were read."""

import numpy as np
import pytest

from dllm_jax.objectives.llada import LLaDA
from dllm_jax.sampling.policies.processors import Temperature
from dllm_jax.sampling.policies.selection import Threshold
from dllm_jax.sampling.policies.unmasking import Unmasking
from dllm_jax.sampling.sampler import Sampler
from dllm_jax.serving.launch import check_served
from tests import golden_cases, quick
from tests.sampling import published


def runs():
  """Returns the recorded runs without a causal context."""
  cases = golden_cases.load("nemotron").config["runs"]
  both = [i for i, run in enumerate(cases) if not run.get("causal_context", 1)]
  return [quick.long(i) for i in both]


def policy(objective, run):
  return Unmasking(
    objective=objective,
    steps=run["block_length"],
    selection=Threshold(value=run["threshold"]),
    processors=(Temperature(0.0),),
  )


@pytest.mark.parametrize("i", runs())
def test_nemotron_without_a_causal_context(i):
  case = golden_cases.load("nemotron")
  run, arrays = case.config["runs"][i], case.arrays
  (prompt,) = published.prompts(arrays[f"run{i}_prompt"])
  own = published.model("nemotron").objective
  got = published.run(
    "nemotron",
    [prompt + [None] * run["max_new_tokens"]],
    objective=LLaDA(vocab_size=own.vocab_size, mask_id=own.mask_id),
    policy=lambda objective: policy(objective, run),
    block_length=run["block_length"],
    cache="block",
    extend=True,
  )
  output = arrays[f"run{i}_output"][0]
  np.testing.assert_array_equal(got.tokens[0], output)
  kinds, first, width = arrays[f"run{i}_calls"].T
  history = published.history(got, 0)
  reads = [k for k in range(len(kinds)) if kinds[k] == 0]
  reads = [
    k for k in reads if (arrays[f"run{i}_inputs"][k] == own.mask_id).any()
  ]
  assert len(reads) == len(history) - 1
  for canvas, k in zip(history, reads, strict=False):
    want = arrays[f"run{i}_inputs"][k, 0, : width[k]]
    np.testing.assert_array_equal(canvas[first[k] : first[k] + width[k]], want)
  # The prompt and each finished block are a call of their own.
  calls = len(reads) + 1 + run["max_new_tokens"] // run["block_length"]
  assert got.function_evaluations[0] == calls


def test_what_keeps_so_hides_what_follows_and_is_not_served():
  objective = LLaDA(vocab_size=8, mask_id=7)
  run = {"block_length": 4, "threshold": 0.5}
  fields = {
    "policy": policy(objective, run),
    "length": 8,
    "block_length": 4,
    "cache": "block",
  }
  with pytest.raises(ValueError, match="or extend, not LLaDA"):
    Sampler(**fields)
  with pytest.raises(ValueError, match="both ways, is not served"):
    check_served(Sampler(**fields, extend=True))

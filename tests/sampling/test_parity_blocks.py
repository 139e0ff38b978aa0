"""SDAR and LLaDA2: block-causal generations, step by step, cached and not."""

import itertools

import numpy as np
import pytest

from dllm_jax.sampling.policies.processors import Temperature
from dllm_jax.sampling.policies.selection import Even, Threshold
from dllm_jax.sampling.policies.unmasking import Unmasking
from tests import golden_cases, quick
from tests.sampling import published

SDAR = golden_cases.load("sdar").config["runs"]
LLADA2 = golden_cases.load("llada2_moe").config["runs"]
CACHES = ("block", "none")


def ceil(n, block):
  return -(-n // block) * block


def blocks_seen(history, block, first):
  """Returns the block that each step worked on: the first with a mask."""
  return [
    row[at : at + block]
    for row in history[:-1]
    for at in [int(np.argmax(row == first)) // block * block]
  ]


@pytest.mark.parametrize(
  "case",
  quick.few(
    list(itertools.product(range(len(SDAR)), CACHES)),
    lambda case: {case[1], SDAR[case[0]]["remasking_strategy"]},
  ),
)
@pytest.mark.few(1)
def test_sdar(case):
  i, kind = case
  run, arrays = SDAR[i], golden_cases.load("sdar").arrays
  block = run["block_length"]
  quota = Even(of="window")
  selection = quota
  if run["remasking_strategy"] == "low_confidence_dynamic":
    selection = Threshold(value=run["confidence_threshold"], least=quota)
  left = run["remasking_strategy"] == "sequential"
  (row,) = published.prompts(arrays["prompt"])
  length = ceil(len(row) + run["gen_length"], block)
  row = row + [None] * (length - len(row))
  objective = published.replace(
    published.model("sdar").objective, block_size=block, length=length
  )
  got = published.run(
    "sdar",
    [row],
    objective=objective,
    policy=lambda objective: Unmasking(
      objective=objective,
      steps=run["denoising_steps"],
      score="left" if left else "confidence",
      selection=selection,
      processors=(Temperature(0.0),),
    ),
    block_length=block,
    blocks_from="start",
    cache=kind,
  )
  expected = arrays[f"run{i}_output"][0]
  np.testing.assert_array_equal(got.tokens[0], expected)
  seen = blocks_seen(published.history(got, 0), block, run["mask_id"])
  stores = got.trace.frames.ran[:, 0]
  if kind == "none":
    np.testing.assert_array_equal(seen, arrays[f"run{i}_block_inputs"])
    assert got.function_evaluations[0] == arrays[f"run{i}_nfe_denoise"]
    assert int(stores.sum()) == arrays[f"run{i}_nfe_denoise"]
  else:
    np.testing.assert_array_equal(seen, arrays[f"run{i}_block_inputs"])
    # The pass over the prompt and one to keep each block count too.
    assert got.function_evaluations[0] == arrays[f"run{i}_nfe"]


@pytest.mark.parametrize(
  "case",
  quick.few(
    list(itertools.product(range(len(LLADA2)), CACHES)),
    lambda case: {case[1], LLADA2[case[0]]["threshold"] < 0.5},
  ),
)
@pytest.mark.all
def test_llada2(case):
  i, kind = case
  case = golden_cases.load("llada2_moe")
  run, arrays = LLADA2[i], case.arrays
  block = run["block_length"]
  (prompt,) = published.prompts(arrays["prompt"])
  length = ceil(len(prompt) + run["gen_length"], block)
  objective = published.replace(
    published.model("llada2_moe").objective, block_size=block, length=length
  )
  got = published.run(
    "llada2_moe",
    [prompt + [None] * (length - len(prompt))],
    objective=objective,
    policy=lambda objective: Unmasking(
      objective=objective,
      steps=block,
      selection=Threshold(
        value=run["threshold"], least=Even(of="window", steps=run["steps"])
      ),
      processors=(Temperature(0.0),),
    ),
    block_length=block,
    blocks_from="start",
    cache=kind,
    end_ids=() if run["eos_id"] is None else (run["eos_id"],),
  )
  inputs = arrays[f"run{i}_inputs"]
  history = published.history(got, 0)
  nfe = int(arrays[f"run{i}_nfe"])
  assert len(history) - 1 == nfe == len(inputs)
  for canvas, want in zip(history, inputs, strict=False):
    want = want[want >= 0]
    np.testing.assert_array_equal(canvas[: len(want)], want)
  expected = arrays[f"run{i}_output"][0]
  found = np.asarray(got.tokens[0])[len(prompt) :][: len(expected)]
  np.testing.assert_array_equal(found, expected)
  if kind == "none":
    assert got.function_evaluations[0] == nfe

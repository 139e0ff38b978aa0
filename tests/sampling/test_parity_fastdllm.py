"""Fast-dLLM: caches, thresholds and factors, step by step."""

import numpy as np
import pytest

from dllm_jax.sampling.policies.processors import Temperature
from dllm_jax.sampling.policies.selection import Even, Factor, Threshold
from dllm_jax.sampling.policies.unmasking import Unmasking
from tests import golden_cases, quick
from tests.sampling import published

NAME = "fastdllm_generate"
RUNS = golden_cases.load(NAME).config["runs"]
FUNCTIONS = {
  "generate": "none",
  "generate_with_prefix_cache": "prefix",
  "generate_with_dual_cache": "dual",
}


def cache(run):
  if "function" in run:
    return FUNCTIONS[run["function"]]
  return run["use_cache"] or "none"


def features(i):
  """Returns what of the sampler a run shows."""
  run = RUNS[i]
  return {cache(run), run["repo"]} | ({"threshold", "factor"} & set(run))


@pytest.mark.parametrize("i", quick.few(range(len(RUNS)), features))
@pytest.mark.few(1)
def test_every_step_and_count(i):
  run, arrays = RUNS[i], golden_cases.load(NAME).arrays
  block = run.get("block_length") or run["block_size"]
  new = run.get("gen_length") or run["max_new_tokens"]
  steps, selection = block, Even()
  if "threshold" in run:
    selection = Threshold(value=run["threshold"])
  elif "factor" in run:
    selection = Factor(value=run["factor"])
  else:
    steps = run["steps"] * block // new
  kind = cache(run)
  (row,) = published.prompts(arrays["prompt"])
  got = published.run(
    NAME,
    [row + [None] * new],
    policy=lambda objective: Unmasking(
      objective=objective,
      steps=steps,
      selection=selection,
      processors=(Temperature(0.0),),
    ),
    block_length=block,
    cache=kind,
    # The cached originals call the network on a block even if it is full.
    least_calls=2 if kind != "none" and "function" in run else 1,
  )
  history = published.history(got, 0)
  np.testing.assert_array_equal(history, arrays[f"run{i}_history"][:, 0])
  assert got.function_evaluations[0] == run["nfe"]

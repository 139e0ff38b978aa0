"""Dream's own sampler, and Fast-dLLM's for it, step by step."""

import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.noise import Recorded, Tag
from dllm_jax.sampling.policies.processors import Temperature, TopK, TopP
from dllm_jax.sampling.policies.selection import Chance, Threshold, Truncated
from dllm_jax.sampling.policies.unmasking import Unmasking
from tests import golden_cases, quick
from tests.sampling import published

NAME = "dream_generate"
RUNS = golden_cases.load(NAME).config["runs"]
SCORES = {
  "maskgit_plus": "confidence",
  "confidence_threshold": "confidence",
  "topk_margin": "margin",
  "entropy": "entropy",
  "origin": "random",
}


def policy_of(run, steps):
  filters = [TopP(run["top_p"])] if "top_p" in run else []
  filters += [TopK(run["top_k"])] if "top_k" in run else []
  if run["alg"] == "origin":
    selection = Chance()
  elif run["alg"] == "confidence_threshold":
    selection = Threshold(value=run["threshold"])
  else:
    selection = Truncated()
  return lambda objective: Unmasking(
    objective=objective,
    steps=steps,
    score=SCORES[run["alg"]],
    selection=selection,
    filters=tuple(filters),
    processors=(Temperature(0.0),),
  )


def recorded(uniform, lengths):
  """Returns the noise of recorded draws, whose rows are padded on the left."""
  uniform = jnp.asarray(uniform)
  pads = uniform.shape[2] - jnp.asarray(lengths)

  def noise(step, slots):
    at = jnp.minimum(slots + pads[:, None], uniform.shape[2] - 1)
    rows = jnp.arange(len(lengths))[:, None]
    u = uniform[jnp.minimum(step, len(uniform) - 1)[:, None], rows, at]
    zero = jnp.full((*u.shape, published.model(NAME).config.vocab_size), 0.5)
    uniforms = {Tag.TRANSFER: u[..., None], Tag.CONFIDENCE: u[..., None]}
    return Recorded(uniforms=uniforms | {Tag.TOKEN: zero})

  return noise


def features(i):
  """Returns what of the sampler a run shows."""
  run = RUNS[i]
  padded = {"padded"} if run.get("left_padded") else set()
  return (
    {run["alg"], run.get("dual_cache")} | {"top_p", "top_k"} & set(run) | padded
  )


PLAIN = [i for i, run in enumerate(RUNS) if "block_length" not in run]
CACHED = [i for i, run in enumerate(RUNS) if "block_length" in run]


@pytest.mark.parametrize("i", quick.few(PLAIN, features))
@pytest.mark.few(1)
def test_every_step(i):
  run, arrays = RUNS[i], golden_cases.load(NAME).arrays
  attended = arrays[f"run{i}_attention_mask"]
  rows = published.prompts(arrays[f"run{i}_prompt"], attended)
  rows = [row + [None] * run["max_new_tokens"] for row in rows]
  expected = arrays[f"run{i}_history"]
  noise = None
  if f"run{i}_uniform" in arrays:
    noise = recorded(arrays[f"run{i}_uniform"], [len(row) for row in rows])
  got = published.run(
    NAME, rows, policy=policy_of(run, run["steps"]), noise=noise
  )
  for b, row in enumerate(rows):
    want = expected[:, b, expected.shape[2] - len(row) :]
    history = published.history(got, b)[:, : len(row)]
    # A row waits once it is full; the original repeats its canvas.
    calls = len(history) - 1
    np.testing.assert_array_equal(history, want[: calls + 1])
    assert (want[calls:] == want[-1]).all()
    assert got.function_evaluations[b] == calls


@pytest.mark.parametrize("i", quick.few(CACHED, features))
@pytest.mark.all
def test_every_step_and_count_with_caches(i):
  run, arrays = RUNS[i], golden_cases.load(NAME).arrays
  block, new = run["block_length"], run["max_new_tokens"]
  steps = block
  if run["alg"] != "confidence_threshold":
    steps = run["steps"] * block // new
  (row,) = published.prompts(arrays[f"run{i}_prompt"])
  got = published.run(
    NAME,
    [row + [None] * new],
    policy=policy_of(run, steps),
    block_length=block,
    cache="dual" if run["dual_cache"] else "prefix",
    least_calls=2,
  )
  history = published.history(got, 0)
  np.testing.assert_array_equal(history, arrays[f"run{i}_history"][:, 0])
  assert got.function_evaluations[0] == run["nfe"]

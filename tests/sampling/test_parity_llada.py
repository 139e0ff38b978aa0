"""LLaDA's own sampler: every canvas of its recorded generations."""

import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.noise import Recorded, Tag
from dllm_jax.sampling.policies.guidance import Guidance
from dllm_jax.sampling.policies.processors import Temperature
from dllm_jax.sampling.policies.selection import Even
from dllm_jax.sampling.policies.unmasking import Unmasking
from tests import golden_cases, quick
from tests.sampling import published

SCORES = {"low_confidence": "confidence", "random": "random"}


def settings(run):
  """Returns the sampler's fields of a recorded run."""
  blocks = run["gen_length"] // run["block_length"]
  temperature = run["temperature"]

  def policy(objective):
    return Unmasking(
      objective=objective,
      steps=run["steps"] // blocks,
      score=SCORES[run["remasking"]],
      selection=Even(),
      processors=(Temperature(temperature),),
    )

  scale = run["cfg_scale"]
  return {
    "policy": policy,
    "block_length": run["block_length"],
    "guidance": Guidance(scale=scale) if scale else None,
  }


def runs(name):
  return golden_cases.load(name).config["runs"]


def few(name):
  """Returns the numbers of a case's runs, those that show nothing new long."""
  return quick.few(range(len(runs(name))), lambda i: _features(runs(name)[i]))


def _features(run):
  """Returns what of the sampler a run shows."""
  blocks = {"blocks"} if run["block_length"] < run["gen_length"] else set()
  padded = {"padded"} if run.get("left_padded") else set()
  return {run["remasking"], run["cfg_scale"] > 0} | blocks | padded


@pytest.mark.parametrize("i", few("llada_generate"))
@pytest.mark.few(1)
def test_every_step_of_greedy_generations(i):
  name = "llada_generate"
  case = golden_cases.load(name)
  run = case.config["runs"][i]
  prompt = case.arrays[f"run{i}_prompt"]
  attended = case.arrays[f"run{i}_attention_mask"]
  expected = case.arrays[f"run{i}_history"]
  rows = published.prompts(prompt, attended)
  rows = [row + [None] * run["gen_length"] for row in rows]
  got = published.run(name, rows, **settings(run))
  for b, row in enumerate(rows):
    # Their rows are padded on the left, ours on the right.
    want = expected[:, b, expected.shape[2] - len(row) :]
    np.testing.assert_array_equal(
      published.history(got, b)[:, : len(row)], want
    )
    assert got.function_evaluations[b] == len(want) - 1


@pytest.mark.parametrize("i", few("llada_generate_noise"))
@pytest.mark.few(1)
def test_every_step_with_recorded_noise(i):
  name = "llada_generate_noise"
  case = golden_cases.load(name)
  run = case.config["runs"][i]
  gumbel = jnp.asarray(case.arrays[f"run{i}_gumbel_uniform"])
  uniforms = {Tag.TOKEN: gumbel[..., : published.model(name).config.vocab_size]}
  if f"run{i}_confidence_uniform" in case.arrays:
    confidence = jnp.asarray(case.arrays[f"run{i}_confidence_uniform"])
    uniforms[Tag.CONFIDENCE] = confidence[..., None]

  def noise(step, slots):
    at = jnp.minimum(slots, gumbel.shape[2] - 1)
    pick = lambda u: u[step[:, None], 0, at]
    return Recorded(uniforms={tag: pick(u) for tag, u in uniforms.items()})

  (row,) = published.prompts(case.arrays[f"run{i}_prompt"])
  got = published.run(
    name, [row + [None] * run["gen_length"]], noise=noise, **settings(run)
  )
  expected = case.arrays[f"run{i}_history"][:, 0]
  np.testing.assert_array_equal(published.history(got, 0), expected)
  assert got.function_evaluations[0] == len(expected) - 1

"""The dllm framework's sampler: plans of steps, ragged prompts, infilling."""

import dataclasses
import itertools

import numpy as np
import pytest

from dllm_jax.sampling.policies.guidance import Guidance
from dllm_jax.sampling.policies.processors import Banned, Temperature
from dllm_jax.sampling.policies.selection import Proportional
from dllm_jax.sampling.policies.unmasking import Unmasking
from tests import golden_cases, quick
from tests.sampling import published

CASE = golden_cases.load("dllm")
RUNS = CASE.config["runs"]


@pytest.mark.parametrize("transfer", CASE.config["transfer"], ids=str)
def test_how_many_are_revealed(transfer):
  curve = transfer["key"].split("_")[1]
  plan = Proportional(curve=curve)
  table = plan.plan(transfer["steps"], max(transfer["masked"]))
  expected = CASE.arrays[transfer["key"]]
  for left, want in zip(transfer["masked"], expected, strict=True):
    found = table[left]
    np.testing.assert_array_equal(found[found > 0], want[want > 0])
    assert found.sum() == left


def rows_of(run):
  arrays, mask = CASE.arrays, published.model("dllm").objective.mask_id
  name = "infill" if run["function"] == "infill" else "prompt"
  names = itertools.takewhile(
    arrays.__contains__, (f"{name}_{j}" for j in itertools.count())
  )
  rows = [arrays[name].tolist() for name in names]
  assert rows
  if name == "infill":
    return [[None if x == mask else x for x in row] for row in rows]
  return [row + [None] * run["max_new_tokens"] for row in rows]


def changes(history):
  """Returns canvases without those that repeat the one before."""
  differ = np.any(history[1:] != history[:-1], axis=1)
  return history[np.concatenate([[True], differ])]


def features(i):
  """Returns what of the sampler a run shows."""
  run = RUNS[i]
  names = ("cfg_scale", "right_shift_logits", "suppress_tokens")
  return {run["function"]} | {name for name in names if run.get(name)}


@pytest.mark.parametrize("i", quick.few(range(len(RUNS)), features))
@pytest.mark.few(2)
def test_every_step(i):
  run, rows = RUNS[i], rows_of(RUNS[i])
  objective = published.model("dllm").objective
  if run.get("right_shift_logits"):
    objective = dataclasses.replace(objective, shift=1)
  infill, block = run["function"] == "infill", run["block_size"]
  total = max(map(len, rows)) if infill else run["max_new_tokens"]
  steps = -(-run["steps"] // -(-total // block))
  scale = run.get("cfg_scale", 0.0)

  def policy(objective):
    return Unmasking(
      objective=objective,
      steps=steps,
      selection=Proportional(),
      filters=(Banned(tuple(run.get("suppress_tokens", ()))),),
      doubts=(Banned(tuple(run.get("begin_suppress_tokens", ()))),),
      processors=(Temperature(0.0),),
    )

  got = published.run(
    "dllm",
    rows,
    objective=objective,
    policy=policy,
    block_length=block,
    blocks_from="start" if infill else "prompt",
    guidance=Guidance(scale=scale) if scale else None,
  )
  expected = CASE.arrays[f"sample{i}_history"]
  for b, row in enumerate(rows):
    want = changes(expected[:, b, : len(row)])
    history = published.history(got, b)[:, : len(row)]
    np.testing.assert_array_equal(changes(history), want)
    # A row waits once it is full: one call for each change, and no other.
    assert got.function_evaluations[b] == len(want) - 1

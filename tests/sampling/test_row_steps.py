"""Rows that take fewer steps than their sampler: as a sampler of so many steps."""

import dataclasses

import jax
import numpy as np
import pytest

from dllm_jax.core.types import Process
from dllm_jax.objectives.md4 import MD4
from dllm_jax.sampling.options import RowOptions, stack
from dllm_jax.sampling.policies.revision import MaskPredict
from dllm_jax.sampling.policies.selection import Everything
from dllm_jax.sampling.policies.unmasking import Unmasking
from dllm_jax.sampling.presets import SamplerConfig
from tests.quick import long
from tests.sampling import published
from tests.sampling.test_options import asked, ENDS, LENGTH, NETWORK, OBJECTIVES

STEPS = (1, 2, None, 2)


def sample(config, objective, steps):
  """Returns a generation of the table's, each row with steps of its own."""
  spec = config.build(objective, length=LENGTH, end_ids=ENDS)
  options = stack(
    [RowOptions(steps=n, seed=5) for n in steps],
    defaults=config.options(ENDS),
    objective=objective,
    steps=spec.row_steps,
  )
  requests = asked(objective).replace(options=options)
  key = jax.random.key(0)
  return published.quick(spec, NETWORK, {}, Process(), key, requests)


@pytest.mark.parametrize(
  ("preset", "name", "fields"),
  [
    ("llada", "llada", {"block_length": 4}),
    long("fast_dllm", "llada", {"block_length": 4, "threshold": 0.99}),
    long("fast_dllm", "dream", {"block_length": 4, "threshold": 0.99}),
    long("llada2_edit", "bd3lm", {"stop": False}),
    long("llada2", "bd3lm", {"stop": False}),
    long("maskgit", "llada", {}),
    long("fast_dllm_factor", "llada", {"block_length": 4, "factor": 0.1}),
    long("entropy_bound", "llada", {"entropy_bound": 0.01}),
    long("llada_random", "llada", {}),
  ],
)
def test_a_row_takes_its_own_steps(preset, name, fields):
  config = SamplerConfig(preset=preset, temperature=1.0, **fields)
  found = sample(config, OBJECTIVES[name], STEPS)
  calls = np.asarray(found.function_evaluations)
  assert calls[0] <= calls[1] < calls[2]
  for row, steps in enumerate(STEPS[:3]):
    of_all = dataclasses.replace(config, steps=steps or 0)
    shifted = steps == 1 and fields.get("block_length") and name == "dream"
    if shifted:
      continue  # such a sampler needs 2: a row takes them, too
    want = sample(of_all, OBJECTIVES[name], (None,) * len(STEPS))
    for field in ("tokens", "revealed_at", "function_evaluations", "log_prob"):
      np.testing.assert_array_equal(
        getattr(found, field)[row], getattr(want, field)[row], err_msg=field
      )


@pytest.mark.parametrize(
  ("preset", "name"),
  [
    ("mdlm", "mdlm"),
    ("dream", "dream"),
    ("dream_origin", "dream"),
    ("dllm", "llada"),
    ("mask_predict", "llada"),
  ],
)
def test_plans_that_are_made_before_are_everyones(preset, name):
  config = SamplerConfig(preset=preset)
  built = config.build(OBJECTIVES[name], length=LENGTH, end_ids=ENDS)
  assert built.row_steps is None
  with pytest.raises(ValueError, match="^steps of a row mean nothing"):
    sample(config, OBJECTIVES[name], STEPS)


def test_what_else_goes_by_the_number_of_steps():
  llada = OBJECTIVES["llada"]
  paced = Unmasking(objective=llada, steps=8)
  assert paced.paces
  told = MD4(vocab_size=9, mask_id=8, time_conditioning=True)
  for other in (
    Unmasking(objective=told, steps=8),
    Unmasking(objective=llada, steps=8, falling="compounding"),
    Unmasking(
      objective=llada,
      steps=8,
      selection=Everything(),
      revision=MaskPredict(),
    ),
  ):
    assert not other.paces


@pytest.mark.parametrize(
  ("steps", "says"),
  [(5, "^steps must be at most 4"), (0, "steps"), (1.5, "whole number")],
)
def test_steps_that_are_not_legal(steps, says):
  config = SamplerConfig(preset="llada", block_length=4)
  with pytest.raises(ValueError, match=says):
    sample(config, OBJECTIVES["llada"], (steps, None, None, None))

"""Sliding windows: with what is behind them kept, the same tokens."""

import dataclasses

import jax
import numpy as np
import pytest

from dllm_jax.core.types import Process
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.sampling.policies.guidance import Guidance
from dllm_jax.sampling.policies.processors import Temperature
from dllm_jax.sampling.policies.unmasking import Unmasking
from dllm_jax.sampling.policies.windows.parts import Sliding
from dllm_jax.sampling.requests import build
from dllm_jax.sampling.sampler import Sampler
from dllm_jax.serving.launch import check_served
from tests import golden_cases, quick
from tests.sampling import published

LENGTH = 28


def sampler(cache, *, temperature=0.0, ends=(), **fields):
  """Returns a sampler with a window of six slots."""
  objective = published.model("wedlm").objective
  policy = Unmasking(
    objective=objective,
    steps=LENGTH,
    score="entropy",
    selection=Sliding(width=6, **fields),
    processors=(Temperature(temperature),),
  )
  return Sampler(policy=policy, length=LENGTH, cache=cache, end_ids=ends)


@pytest.mark.parametrize(
  "fields",
  [
    quick.long({"bound": 1.0}),
    quick.long({"bound": 0.0}),
    quick.long({"bound": 2.0, "penalty": 0.1, "temperature": 0.8}),
    quick.long({"bound": 1.5, "temperature": 1.0, "ends": True}),
  ],
  ids=str,
)
def test_tokens_are_those_of_whole_canvases(fields):
  model = published.model("wedlm")
  ends = tuple(range(20)) if fields.get("ends") else ()
  (tokens,) = published.prompts(
    golden_cases.load("wedlm").arrays["input_ids"][:1]
  )
  tokens = [x for x in tokens if x != model.objective.mask_id]
  rows = [tokens[:3] + [None] * 25, tokens[:11] + [None] * 9, [None] * 28]
  requests = build(rows, objective=model.objective, length=LENGTH)
  args = model.params, Process(), jax.random.key(3), requests
  whole, kept = (
    published.quick(
      sampler(cache, **{**fields, "ends": ends}), model.denoiser, *args
    )
    for cache in ("none", "block")
  )
  np.testing.assert_array_equal(kept.tokens, whole.tokens)
  if not ends:
    np.testing.assert_array_equal(kept.revealed_at, whole.revealed_at)
    np.testing.assert_allclose(kept.log_prob, whole.log_prob, atol=1e-4)
    return
  # A row that has ended is left alone, where all else is decided first.
  assert (kept.function_evaluations <= whole.function_evaluations + 1).all()
  assert (kept.function_evaluations < whole.function_evaluations).any()


def test_what_cannot_slide_is_refused():
  spec = sampler("block")
  with pytest.raises(ValueError, match="not served: use sampler.cache 'none'"):
    check_served(spec)
  replace = dataclasses.replace
  few = replace(spec.policy, steps=LENGTH - 1)
  other = MDLM(vocab_size=spec.objective.vocab_size, mask_id=1)
  for fields, words in (
    ({"policy": few}, "as many steps"),
    ({"block_length": 4}, "block_length None"),
    ({"guidance": Guidance(scale=1.0)}, "no guidance"),
    ({"policy": replace(spec.policy, objective=other)}, "WeDLM"),
  ):
    with pytest.raises(ValueError, match=words):
      replace(spec, **fields)

"""What a network call computes, and when none is made."""

import functools

import jax
import numpy as np
import pytest

from dllm_jax.core.types import Process
from dllm_jax.sampling.policies import Ancestral
from dllm_jax.sampling.program import generate, Sampler
from dllm_jax.sampling.requests import build, continuation
from tests.sampling.small import (
  dual,
  KEY,
  LENGTH,
  MDLM_,
  network,
  ragged,
  rows,
  sample,
)


class Restless(Ancestral):
  """Ancestral sampling that never leaves the network alone."""

  idles = False


@pytest.mark.parametrize("block", [None, 8])
def test_an_unchanged_canvas_needs_no_network_call(block):
  requests = ragged(MDLM_)
  spec = lambda policy: Sampler(
    policy=policy(objective=MDLM_, steps=60), length=LENGTH, block_length=block
  )
  kept, plain = (
    sample(spec(policy), requests) for policy in (Ancestral, Restless)
  )
  np.testing.assert_array_equal(kept.tokens, plain.tokens)
  free = np.asarray(requests.valid & ~requests.fixed).sum(axis=1)
  # At most one call for each slot, and one at each block's entry.
  blocks = 1 if block is None else LENGTH // block
  assert (kept.function_evaluations <= free + blocks).all()
  assert (plain.function_evaluations > 2 * kept.function_evaluations).all()
  alone = sample(spec(Ancestral), rows(requests, [2]))
  np.testing.assert_array_equal(alone.tokens[0], kept.tokens[2])
  assert alone.function_evaluations[0] == kept.function_evaluations[2]


def test_a_prefix_cache_may_reach_as_far_as_the_text():
  """The same tokens, from calls that are as wide as what follows a prompt."""
  made = [continuation([i] * 12, length=LENGTH) for i in (3, 4)]
  requests = build(made, objective=MDLM_, length=LENGTH)
  whole = sample(dual(MDLM_, cache="prefix"), requests)
  part = sample(dual(MDLM_, cache="prefix", reach=12), requests)
  np.testing.assert_array_equal(part.tokens, whole.tokens)
  block = sample(dual(MDLM_, cache="prefix", reach=4), requests)
  np.testing.assert_array_equal(
    block.tokens, sample(dual(MDLM_, cache="dual"), requests).tokens
  )
  assert widths(dual(MDLM_, cache="prefix", reach=12), requests) == {12, 24}
  assert widths(dual(MDLM_, cache="dual"), requests) == {4, 24}


def widths(spec, requests):
  """Returns how many positions the network's calls in a program have."""
  denoiser, params = network()
  seen = set()

  def apply(params, inputs, cache):
    if cache is not None:
      seen.add(inputs.latent.shape[1])
    return denoiser.apply(params, inputs, cache)

  spied = denoiser._replace(apply=apply)
  args = params, Process(), KEY, requests
  jax.eval_shape(functools.partial(generate, spec, spied), *args)
  return seen

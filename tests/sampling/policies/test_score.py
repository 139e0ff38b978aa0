"""Scores of draws: their log-sums, and how often they read the vocabulary."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.noise import Keyed
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.parallel import compilation
from dllm_jax.sampling.policies.processors import Temperature
from dllm_jax.sampling.policies.rows import NONE
from dllm_jax.sampling.policies.score import log_sum
from dllm_jax.sampling.policies.unmasking import Unmasking

VOCAB, MASK = 51, 20
POLICY = Unmasking(
  objective=MDLM(vocab_size=VOCAB, mask_id=MASK),
  steps=4,
  processors=(Temperature(0.0),),
)


@pytest.mark.parametrize("mask_logit", [-np.inf, -3.0, 4.0, 300.0])
@pytest.mark.parametrize("known", [True, False])
def test_log_sums_are_those_with_and_without_the_mask(mask_logit, known):
  """However sure the mask is: no difference of two large sums is formed."""
  rng = np.random.default_rng(0)
  logits = rng.normal(0.0, 5.0, (2, 3, VOCAB)).astype(np.float32)
  logits[..., MASK] = mask_logit
  logits[0, 0, :7] = -np.inf
  others = np.delete(logits, MASK, axis=-1).astype(np.float64)
  largest = jnp.asarray(others.max(axis=-1), jnp.float32) if known else None
  legal = np.where(np.arange(VOCAB) == MASK, -np.inf, logits)
  found = log_sum(jnp.asarray(legal), largest)
  right = np.log(np.exp(others).sum(axis=-1))
  np.testing.assert_allclose(found, right, rtol=1e-6, atol=1e-6)
  _, of_all = POLICY._sums(
    jnp.asarray(logits), jnp.asarray(np.argmax(legal, axis=-1)), None, NONE
  )
  right = np.logaddexp(right, mask_logit)
  np.testing.assert_allclose(of_all, right, rtol=1e-6, atol=1e-6)


def test_where_no_token_is_possible_log_sums_of_a_known_largest_are_none():
  nothing = jnp.full((1, 1, VOCAB), -jnp.inf)
  found = log_sum(nothing, jnp.full((1, 1), -jnp.inf))
  assert np.isneginf(found).all()


@pytest.mark.parametrize("processors", [(Temperature(0.0),), ()], ids=str)
def test_a_draw_and_its_scores_exponentiate_the_vocabulary_once(processors):
  """A token's log-probability, its confidence and the draw share what they form."""
  policy = dataclasses.replace(POLICY, processors=processors)

  def draw(logits, z, noise, slot):
    return policy.draw(logits, z, noise, slot, NONE, None)

  logits, z = jnp.zeros((2, 3, VOCAB)), jnp.full((2, 3), MASK)
  slot = jnp.broadcast_to(jnp.arange(3), z.shape)
  noise = Keyed(jnp.zeros((2, 3, 2), jnp.uint32))
  text = compilation.jit(draw).lower(logits, z, noise, slot).compile().as_text()
  shapes = re.findall(r"f32\[([\d,]+)\]\S* exponential\(", text)
  wide = [
    s for s in shapes if np.prod(list(map(int, s.split(",")))) > 2 * 3 * 8
  ]
  assert len(wide) == 1

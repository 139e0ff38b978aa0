"""Renoising: what is sure stays, the rest is drawn anew, until nothing moves."""

from flax import struct
import jax
import jax.numpy as jnp
import pytest

from dllm_jax.core.noise import Tag
from dllm_jax.core.types import ModelOutputs, Process
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.objectives.udlm import UDLM
from dllm_jax.sampling.policies.renoising import Renoise

VOCAB = 5
OBJECTIVE = UDLM(vocab_size=VOCAB)
# Three slots: sure of token 3, nearly sure of 1, and without an opinion.
LOGITS = jnp.array([[[0.0, 0, 0, 30, 0], [0, 6.0, 0, 0, 0], [0.0] * VOCAB]])


@struct.dataclass
class Given:
  """Greedy draws, and a uniform of 0.7 for each slot that is drawn anew."""

  like: jax.Array

  def uniform(self, tag, n):
    assert tag == Tag.REMASK
    return jnp.full((*self.like.shape, n), 0.7)

  def categorical(self, tag, logits):
    del tag
    return jnp.argmax(logits, axis=-1)


def step(policy, tokens, *, at=0, logits=LOGITS):
  """Returns the tokens after a step, and the state."""
  z, active = jnp.array([tokens]), jnp.ones((1, 3), bool)
  state = policy.init(Process(), z, active)
  state = state.replace(step=state.step + at)
  out, noise = ModelOutputs(hidden=logits), Given(like=z)
  z, state, _ = policy.step(Process(), noise, out, z, state, active)
  return z[0].tolist(), state


def test_the_surest_stay_while_their_entropies_are_bounded():
  policy = Renoise(objective=OBJECTIVE, steps=48, bound=0.1)
  # Entropies about 0, 0.09 and log 5: all but the greatest sum to under 0.1.
  tokens, state = step(policy, [0, 0, 0])
  assert tokens[:2] == [3, 1]
  assert tokens[2] == 0 and not state.settled[0]
  tight = Renoise(objective=OBJECTIVE, steps=48, bound=0.0)
  # The greatest of two is left out of the sum; the third gets floor(0.7 * 5).
  assert step(tight, [0, 0, 0])[0] == [3, 1, 3]


def test_all_are_kept_at_the_last_step():
  tight = Renoise(objective=OBJECTIVE, steps=48, bound=0.0)
  assert step(tight, [0, 0, 0], at=47)[0] == [3, 1, 0]


def test_a_canvas_that_is_sure_and_stands_still_is_done():
  policy = Renoise(objective=OBJECTIVE, steps=48)
  sure = jnp.zeros((1, 3, VOCAB)).at[..., 2].set(30.0)
  tokens, state = step(policy, [2, 2, 1], logits=sure)
  assert tokens == [2, 2, 2] and not state.settled[0]
  _, state = step(policy, [2, 2, 2], logits=sure)
  assert state.settled[0]
  assert policy.done(Process(), None, state, None)[0]
  # What it comes to rest with is no random token.
  tight = Renoise(objective=OBJECTIVE, steps=48, bound=0.0, rest=9.0)
  tokens, state = step(tight, [3, 1, 0])
  assert state.settled[0] and tokens == [3, 1, 0]


def test_a_process_with_a_mask_is_refused():
  with pytest.raises(ValueError, match="uniform process"):
    Renoise(objective=MDLM(vocab_size=4, mask_id=3), steps=2)

"""Renoising: what is sure stays, the rest is drawn anew, until nothing moves."""

from flax import struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.noise import Keyed, Tag
from dllm_jax.core.types import ModelOutputs, Process
from dllm_jax.objectives.diffusion_gemma import DiffusionGemma
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.objectives.udlm import UDLM
from dllm_jax.sampling.policies.renoising import Renoise
from tests import jaxprs

VOCAB = 5
OBJECTIVE = UDLM(vocab_size=VOCAB)
# Three slots: sure of token 3, nearly sure of 1, and without an opinion.
LOGITS = jnp.array([[[0.0, 0, 0, 30, 0], [0, 6.0, 0, 0, 0], [0.0] * VOCAB]])
SURE = jnp.zeros((1, 3, VOCAB)).at[..., 2].set(30.0)


@struct.dataclass
class Given:
  """Draws the last token, and a uniform of 0.7 for slots that are drawn anew."""

  like: jax.Array

  def uniform(self, tag, n):
    assert tag == Tag.REMASK
    return jnp.full((*self.like.shape, n), 0.7)

  def categorical(self, tag, logits):
    assert tag == Tag.TOKEN
    last = logits.shape[-1] - 1 - jnp.argmax(logits[..., ::-1], axis=-1)
    return last.astype(jnp.int32)


def begin(policy, tokens, *, at=0):
  z, active = jnp.array([tokens]), jnp.ones((1, 3), bool)
  state = policy.init(Process(), z, active)
  return z, state.replace(step=state.step + at)


def step(policy, tokens, *, at=0, logits=LOGITS, state=None, out=None):
  """Returns the tokens after a step, the state and what it says."""
  z, first = begin(policy, tokens, at=at)
  out = ModelOutputs(hidden=logits) if out is None else out
  active = jnp.ones(z.shape, bool)
  z, state, info = policy.step(
    Process(), Given(like=z), out, z, first if state is None else state, active
  )
  return z[0].tolist(), state, info


@pytest.mark.all
def test_the_surest_stay_while_the_entropies_before_them_are_bounded():
  policy = Renoise(objective=OBJECTIVE, steps=48, bound=0.1)
  # At temperature 0.8 entropies are 0, 0.02 and log 5: those before the greatest
  # sum to under 0.1, and it is taken as well.
  tokens, state, _ = step(policy, [0, 0, 0])
  assert tokens == [3, 1, 4] and not state.settled[0]
  tight = Renoise(objective=OBJECTIVE, steps=48, bound=0.0)
  # The first is always taken, the second since 0 lie before it; the third gets
  # floor(0.7 * 5).
  assert step(tight, [0, 0, 0])[0] == [3, 1, 3]


@pytest.mark.all
def test_the_temperature_counts_the_calls_that_remain():
  # Two tokens, one 1 nat ahead: the entropy at each temperature is known.
  logits = jnp.full((1, 3, VOCAB), -jnp.inf).at[..., :2].set([0.0, 1.0])
  policy = Renoise(objective=OBJECTIVE, steps=4, hot=0.8, cold=0.4, rest=0.0)
  for call, heat in enumerate((0.8, 0.7, 0.6, 0.5)):
    p = 1 / (1 + np.exp(-1 / heat))
    _, _, info = step(policy, [0, 0, 0], at=call, logits=logits)
    np.testing.assert_allclose(info["confidence"], p, rtol=1e-5)


def test_the_best_tokens_of_the_last_call_are_what_leaves():
  tight = Renoise(objective=OBJECTIVE, steps=48, bound=0.0)
  # The third slot's draw was 4, its random token 3: neither is its best token.
  assert step(tight, [0, 0, 0], at=46)[0] == [3, 1, 3]
  assert step(tight, [0, 0, 0], at=47)[0] == [3, 1, 0]


def test_a_canvas_rests_when_its_best_tokens_stand_and_it_is_sure():
  policy = Renoise(objective=OBJECTIVE, steps=48)
  _, state, _ = step(policy, [2, 2, 2], logits=SURE)
  assert not state.settled[0]  # whatever went in: there is no call before
  tokens, state, _ = step(policy, [1, 1, 1], logits=SURE, state=state)
  assert state.settled[0] and tokens == [2, 2, 2]
  assert policy.done(Process(), None, state, None)[0]
  # One that is not sure goes on.
  _, state, _ = step(policy, [0, 0, 0])
  assert not step(policy, [0, 0, 0], state=state)[1].settled[0]
  never = Renoise(objective=OBJECTIVE, steps=48, rest=0.0)
  _, state, _ = step(never, [2, 2, 2], logits=SURE)
  assert not step(never, [2, 2, 2], logits=SURE, state=state)[1].settled[0]


@pytest.mark.parametrize("stable", [0, 1, 2, 3])
def test_stability_is_over_as_many_calls_as_asked_for(stable):
  policy = Renoise(objective=OBJECTIVE, steps=48, stable=stable)
  other = jnp.zeros((1, 3, VOCAB)).at[..., 1].set(30.0)
  state, settled = None, []
  for logits in (SURE, other, SURE, SURE, SURE, SURE):
    _, state, _ = step(policy, [0, 0, 0], logits=logits, state=state)
    settled.append(bool(state.settled[0]))
  assert settled.index(True) == (0 if stable == 0 else stable + 2)


def test_no_random_token_is_left_of_a_canvas_that_stops_early():
  """As published: mean entropy 0.0035, 256 slots, all sure of token 5."""
  objective = UDLM(vocab_size=64)
  logits = jnp.zeros((1, 256, 64)).at[..., 5].set(10.0)
  z = jnp.full((1, 256), 5)

  @jax.jit
  def after(best):
    policy = Renoise(objective=objective, steps=48)
    active = jnp.ones(z.shape, bool)
    state = policy.init(Process(), z, active).replace(best=best)
    noise = Keyed.at(
      jax.random.key(0),
      request=jnp.zeros(1, jnp.int32),
      step=jnp.zeros(1, jnp.int32),
      position=jnp.arange(256)[None],
    )
    out = ModelOutputs(hidden=logits)
    return policy.step(Process(), noise, out, z, state, active)[:2]

  tokens, state = after(z)
  assert state.settled[0] and np.all(tokens == 5)
  tokens, state = after(z - 1)
  assert not state.settled[0]
  assert np.sum(tokens != 5) > 200  # what an early stop would have returned


def test_what_is_said_is_of_the_tempered_logits():
  objective = DiffusionGemma(vocab_size=VOCAB, canvas=3)
  table = jax.random.normal(jax.random.key(0), (2, VOCAB + 3))  # 3 pad
  hidden = jax.random.normal(jax.random.key(1), (1, 3, 2))
  out = ModelOutputs(hidden=hidden, unembed=table, vocab_size=VOCAB)
  policy = Renoise(objective=objective, steps=4, hot=0.8, cold=0.4, bound=99.0)
  assert policy.conditions
  (*tokens,), _, info = step(policy, [0, 0, 0], at=1, out=out)
  p = jax.nn.softmax(hidden @ table[:, :VOCAB] / 0.7)
  np.testing.assert_allclose(info["said"], p @ table[:, :VOCAB].T, rtol=1e-5)
  likely = p[:, jnp.arange(3), jnp.array(tokens)]
  np.testing.assert_allclose(info["confidence"], likely, rtol=1e-5)
  np.testing.assert_allclose(info["log_prob"], jnp.log(likely), rtol=1e-5)


def published(width):
  """Returns a step at DiffusionGemma's sizes, 8 rows, and its arguments."""
  objective = DiffusionGemma(vocab_size=262_144, canvas=256)
  policy = Renoise(objective=objective, steps=48)

  def run(hidden, table, data, z):
    active = jnp.ones(z.shape, bool)
    out = ModelOutputs(hidden=hidden, unembed=table.T, tied=True)
    state = policy.init(Process(), z, active)
    return policy.step(Process(), Keyed(data), out, z, state, active)

  array = jax.ShapeDtypeStruct
  z, data = array((8, 256), jnp.int32), array((8, 256, 2), jnp.uint32)
  hidden = array((8, 256, width), jnp.bfloat16)
  table = array((262_144, width), jnp.bfloat16)
  return run, (hidden, table, data, z)


def test_no_call_holds_a_canvas_times_the_vocabulary():
  run, args = published(64)  # narrower than what follows
  jaxpr = jax.make_jaxpr(run)(*args)
  assert not jaxprs.larger_than(jaxpr, 256 * 262_144)  # one row's canvas


def test_a_process_with_a_mask_is_refused():
  with pytest.raises(ValueError, match="uniform process"):
    Renoise(objective=MDLM(vocab_size=4, mask_id=3), steps=2)

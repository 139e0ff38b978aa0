"""Policies: quotas, order, and what confidence reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.noise import Keyed, Tag
from dllm_jax.core.types import ModelOutputs, Process
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.sampling.policies.ancestral import Ancestral
from dllm_jax.sampling.policies.processors import Banned, Temperature
from dllm_jax.sampling.policies.rows import NONE
from dllm_jax.sampling.policies.unmasking import Unmasking
from tests import jaxprs

OBJECTIVE = MDLM(vocab_size=6, mask_id=5)


def noise_at(rows, length, step=0):
  return Keyed.at(
    jax.random.key(1),
    request=jnp.arange(rows),
    step=jnp.full((rows,), step),
    position=jnp.broadcast_to(jnp.arange(length), (rows, length)),
  )


def reveal(policy, logits, z, active):
  """Returns the canvas after each step of a window, of one program."""

  @jax.jit
  def run(logits, z, active):
    out = ModelOutputs(hidden=logits)

    def body(carry, step):
      z, state = carry
      noise = noise_at(*z.shape, step)
      new, state, _ = policy.step(Process(), noise, out, z, state, active)
      z = jnp.where(active, new, z)
      return (z, state), z

    start = z, policy.init(Process(), z, active)
    return jax.lax.scan(body, start, jnp.arange(policy.steps))[1]

  return np.asarray(run(np.float32(logits), np.int32(z), active))


def normal(key, *shape):
  """Returns random logits."""
  return np.random.default_rng(key).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("score", ["confidence", "random"])
def test_quotas_are_exact(score):
  policy = Unmasking(objective=OBJECTIVE, steps=4, score=score)
  free = np.array([11, 4, 3, 0])
  active = np.arange(11) < free[:, None]
  z = np.where(active, 5, 0)
  logits = normal(2, 4, 11, 6)
  masked = [(frame == 5).sum(1) for frame in reveal(policy, logits, z, active)]
  counts = -np.diff(np.stack([free, *masked]), axis=0).T
  np.testing.assert_array_equal(
    counts, [[3, 3, 3, 2], [1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]
  )


def test_the_surest_slots_come_first_and_ties_by_slot():
  policy = Unmasking(
    objective=OBJECTIVE, steps=4, processors=(Temperature(0.0),)
  )
  logits = np.zeros((1, 4, 6))
  logits[0, :, 2] = [1.0, 3.0, 2.0, 3.0]
  z, active = np.full((1, 4), 5), np.ones((1, 4), bool)
  frames = reveal(policy, logits, z, active)
  order = [np.flatnonzero(frame[0] == 2).tolist() for frame in frames]
  assert order == [[1], [1, 3], [1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize("others", [(), (Banned((0,)),)])
def test_the_best_token_is_taken_without_a_draw(others):
  policy = Unmasking(
    objective=OBJECTIVE, steps=4, processors=(*others, Temperature(0.0))
  )

  def drawn(logits, z, noise):
    read = policy.drawn(logits, z, NONE)
    return noise.categorical(Tag.TOKEN, read)

  def taken(logits, z, noise):
    return policy.token(logits, z, NONE, noise)[0]

  noise = noise_at(2, 8)
  data, z = normal(6, 2, 8, 6), np.full((2, 8), 5)
  want, got = (jax.jit(f)(data, z, noise) for f in (drawn, taken))
  np.testing.assert_array_equal(got, want)
  costly = {"random_bits", "random_fold_in", "cumsum", "exp"}
  made = lambda f: jaxprs.primitives(jax.make_jaxpr(f)(data, z, noise)) & costly
  assert made(drawn) == costly and not made(taken)


@pytest.mark.parametrize("where", ["filters", "processors"])
def test_confidence_is_read_after_filters_and_before_processors(where):
  policy = Unmasking(
    objective=OBJECTIVE, steps=1, **{where: (Temperature(0.5),)}
  )
  logits, z, active = (
    normal(3, 1, 4, 6),
    np.full((1, 4), 5),
    np.ones((1, 4), bool),
  )

  @jax.jit
  def run(logits, z, active):
    state = policy.init(Process(), z, active)
    out = ModelOutputs(hidden=logits)
    return policy.step(Process(), noise_at(1, 4), out, z, state, active)

  new, _, info = jax.device_get(run(logits, z, active))
  want = np.exp(2.0 * logits if where == "filters" else logits)
  want /= want.sum(axis=-1, keepdims=True)
  want = np.take_along_axis(want, new[..., None], -1)[..., 0]
  np.testing.assert_allclose(info["confidence"], want, rtol=1e-5)  # float32


@pytest.mark.parametrize("policy", [Ancestral, Unmasking])
def test_the_mask_is_never_drawn_even_if_the_network_prefers_it(policy):
  policy = policy(objective=OBJECTIVE, steps=2, processors=(Temperature(0.0),))
  logits = np.zeros((2, 8, 6))
  logits[..., 5], logits[..., 3] = 30.0, 1.0
  z, active = np.full((2, 8), 5), np.ones((2, 8), bool)
  assert (reveal(policy, logits, z, active)[-1] == 3).all()


def test_ancestral_takes_the_objectives_own_law():
  policy = Ancestral(objective=OBJECTIVE, steps=3)
  z, active = np.full((2, 8), 5), np.ones((2, 8), bool)

  @jax.jit
  def run(logits, z, active):
    out, noise = ModelOutputs(hidden=logits), noise_at(2, 8)
    first, grid = policy.init(Process(), z, active), OBJECTIVE.grid(3)
    new, second, _ = policy.step(Process(), noise, out, z, first, active)
    t, s = jnp.full((2, 1), grid[0]), jnp.full((2, 1), grid[1])
    want = OBJECTIVE.reverse(Process(), noise, out, z, t, s)
    return grid, policy.time(first), policy.time(second), new, want

  grid, first, second, new, want = run(normal(4, 2, 8, 6), z, active)
  np.testing.assert_array_equal(first, [[grid[0]], [grid[0]]])
  np.testing.assert_array_equal(new, want)
  np.testing.assert_array_equal(second, [[grid[1]], [grid[1]]])


def test_bad_policies():
  with pytest.raises(ValueError, match="at least 1 step"):
    Ancestral(objective=OBJECTIVE, steps=0)
  with pytest.raises(ValueError, match="score must be one of"):
    Unmasking(objective=OBJECTIVE, steps=1, score="wit")

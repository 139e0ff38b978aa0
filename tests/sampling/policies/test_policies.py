"""Policies: quotas, order, and what confidence reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.noise import Keyed
from dllm_jax.core.types import ModelOutputs, Process
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.sampling.policies.ancestral import Ancestral
from dllm_jax.sampling.policies.processors import Temperature
from dllm_jax.sampling.policies.unmasking import Unmasking

OBJECTIVE = MDLM(vocab_size=6, mask_id=5)


def noise_at(rows, length, step=0):
  return Keyed.at(
    jax.random.key(1),
    request=jnp.arange(rows),
    step=jnp.full((rows,), step),
    position=jnp.broadcast_to(jnp.arange(length), (rows, length)),
  )


def reveal(policy, logits, z, active):
  """Returns the canvas after each step of a window."""
  state, frames = policy.init(Process(), z, active), []
  call = jax.jit(policy.step)
  for step in range(policy.steps):
    new, state, _ = call(
      Process(),
      noise_at(*z.shape, step),
      ModelOutputs(hidden=logits),
      z,
      state,
      active,
    )
    z = jnp.where(active, new, z)
    frames.append(np.asarray(z))
  return frames


@pytest.mark.parametrize("score", ["confidence", "random"])
def test_quotas_are_exact(score):
  policy = Unmasking(objective=OBJECTIVE, steps=4, score=score)
  free = np.array([11, 4, 3, 0])
  active = jnp.arange(11) < free[:, None]
  z = jnp.where(active, 5, 0)
  logits = jax.random.normal(jax.random.key(2), (4, 11, 6))
  masked = [(frame == 5).sum(1) for frame in reveal(policy, logits, z, active)]
  counts = -np.diff(np.stack([free, *masked]), axis=0).T
  np.testing.assert_array_equal(
    counts, [[3, 3, 3, 2], [1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]
  )


def test_the_surest_slots_come_first_and_ties_by_slot():
  policy = Unmasking(
    objective=OBJECTIVE, steps=4, processors=(Temperature(0.0),)
  )
  sharpness = jnp.array([1.0, 3.0, 2.0, 3.0])
  logits = jnp.zeros((1, 4, 6)).at[0, :, 2].set(sharpness)
  z, active = jnp.full((1, 4), 5), jnp.ones((1, 4), bool)
  frames = reveal(policy, logits, z, active)
  order = [np.flatnonzero(frame[0] == 2).tolist() for frame in frames]
  assert order == [[1], [1, 3], [1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize("where", ["filters", "processors"])
def test_confidence_is_read_after_filters_and_before_processors(where):
  policy = Unmasking(
    objective=OBJECTIVE, steps=1, **{where: (Temperature(0.5),)}
  )
  logits = jax.random.normal(jax.random.key(3), (1, 4, 6))
  z, active = jnp.full((1, 4), 5), jnp.ones((1, 4), bool)
  new, _, info = policy.step(
    Process(),
    noise_at(1, 4),
    ModelOutputs(hidden=logits),
    z,
    policy.init(Process(), z, active),
    active,
  )
  want = 2.0 * logits if where == "filters" else logits
  want = jnp.take_along_axis(jax.nn.softmax(want), new[..., None], -1)[..., 0]
  np.testing.assert_allclose(info["confidence"], want, rtol=1e-5)  # float32


@pytest.mark.parametrize("policy", [Ancestral, Unmasking])
def test_the_mask_is_never_drawn_even_if_the_network_prefers_it(policy):
  policy = policy(objective=OBJECTIVE, steps=2, processors=(Temperature(0.0),))
  logits = jnp.zeros((2, 8, 6)).at[..., 5].set(30.0).at[..., 3].set(1.0)
  z, active = jnp.full((2, 8), 5), jnp.ones((2, 8), bool)
  assert (reveal(policy, logits, z, active)[-1] == 3).all()


def test_ancestral_takes_the_objectives_own_law():
  policy = Ancestral(objective=OBJECTIVE, steps=3)
  z, active = jnp.full((2, 8), 5), jnp.ones((2, 8), bool)
  logits = jax.random.normal(jax.random.key(4), (2, 8, 6))
  out, noise = ModelOutputs(hidden=logits), noise_at(2, 8)
  state = policy.init(Process(), z, active)
  grid = OBJECTIVE.grid(3)
  np.testing.assert_array_equal(policy.time(state), [[grid[0]], [grid[0]]])
  new, state, _ = policy.step(Process(), noise, out, z, state, active)
  t, s = jnp.full((2, 1), grid[0]), jnp.full((2, 1), grid[1])
  want = OBJECTIVE.reverse(Process(), noise, out, z, t, s)
  np.testing.assert_array_equal(new, want)
  np.testing.assert_array_equal(policy.time(state), [[grid[1]], [grid[1]]])


def test_bad_policies():
  with pytest.raises(ValueError, match="at least 1 step"):
    Ancestral(objective=OBJECTIVE, steps=0)
  with pytest.raises(ValueError, match="score must be one of"):
    Unmasking(objective=OBJECTIVE, steps=1, score="wit")

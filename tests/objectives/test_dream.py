"""Dream: context weights, shifted predictions, annealed attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.objectives.dream import context_weights, Dream
from tests.objectives import toy

_LENGTH, _VOCAB, _MASK = 4, 4, 3
_X0 = np.array([2, 0, 1, 1])
_SPACE = {"vocab_size": _VOCAB, "mask_id": _MASK}
_KEY, _STEP = jax.random.key(0), jnp.int32(0)


@pytest.fixture(scope="module")
def table():
  made = toy.Table.random(1, tokens=_VOCAB, length=_LENGTH)
  # The mask is out of reach, so that "softmax" and "subs" are one.
  return toy.Table(logits=made.logits.at[..., _MASK].set(-40.0), tokens=_VOCAB)


def _shifted(table):
  logits = jnp.concatenate([table.logits[:, :1], table.logits[:, :-1]], axis=1)
  return toy.Table(logits=logits, tokens=table.tokens)


def test_context_weights_are_the_published_sum():
  known = np.random.default_rng(4).random((3, 11)) < 0.4
  apart = abs(np.arange(11)[:, None] - np.arange(11))
  matrix = np.where(apart > 0, 0.5 * 0.8 * 0.2 ** (apart - 1.0), 0.0)
  one = np.ones((3, 11), np.int32)
  weights = jax.jit(lambda segments: context_weights(known, 0.8, segments))
  np.testing.assert_allclose(weights(one), known @ matrix, atol=1e-6)
  # Packed: neighbours in another document are no context.
  packed = np.array([[1] * 4 + [2] * 5 + [0] * 2] * 3, np.int32)
  same = packed[0, :, None] == packed[0]
  np.testing.assert_allclose(
    weights(packed), known @ (matrix * same), atol=1e-6
  )


def test_dream_averages_context_weights_over_masked_tokens(table):
  objective = Dream(**_SPACE)
  z = jnp.array([[2, _MASK, 1, _MASK]])
  data, process = toy.batch(_X0[None]), objective.init(_KEY)
  drawn = toy.draw(objective, process, _KEY, data)
  loss = toy.loss(
    objective, process, table, drawn.replace(t=jnp.array([[0.5]]), z=z), data
  )
  log_p = toy.log_p_x0(_shifted(table), _MASK)[int(toy.index(z[0], _VOCAB))]
  # Slot 1 has known neighbours at both sides, slot 3 at distance 1 and 3.
  expected = -(0.8 * log_p[1, 0] + 0.4 * (1 + 0.2**2) * log_p[3, 1]) / 2
  np.testing.assert_allclose(loss.total / loss.weight, expected, rtol=1e-4)
  np.testing.assert_allclose(
    loss.bound, [[0, -2 * log_p[1, 0], 0, -2 * log_p[3, 1]]], rtol=1e-4
  )


def test_attention_is_annealed_from_causal_to_full():
  objective = Dream(**_SPACE, anneal_steps=10)
  data, process = toy.batch(np.tile(_X0, (2, 1))), objective.init(_KEY)
  drawn = toy.draw(objective, process, _KEY, data)
  length, shares = 64, []
  causal = np.tri(length, dtype=bool)
  anneal = jax.jit(objective.annealed_mask, static_argnums=1)
  last = np.iinfo(np.int32).max
  for step in (-1, 0, 4, 9, last):
    mask = np.asarray(anneal(drawn.attention, length, step))
    assert np.all(mask[causal])
    shares.append(mask[~causal].mean())
    # A microbatch, other rows of the batch, has the same mask.
    np.testing.assert_array_equal(
      mask, anneal(drawn.attention[1:], length, step)
    )
  assert shares[0] == 0.0 and shares[3] == shares[4] == 1.0
  # 2016 future slots: the standard error of a share is at most 0.0112.
  np.testing.assert_allclose(shares[1:3], [0.1, 0.5], atol=0.04)


def test_annealed_attention_reaches_the_network():
  objective = Dream(**_SPACE, anneal_steps=10)
  data, process = toy.batch(np.tile(_X0, (2, 1))), objective.init(_KEY)
  drawn = toy.draw(objective, process, _KEY, data)
  drawn = drawn.replace(z=jnp.tile(jnp.array([2, _MASK, 1, _MASK]), (2, 1)))
  network = toy.Attention(length=_LENGTH, tokens=_VOCAB)

  @jax.jit
  def bound(step, row):
    rows = jax.tree.map(lambda x: x[row][None], (drawn, data))
    return objective.loss(process, network, *rows, step=step).bound.sum()

  full = jax.jit(
    lambda: (
      Dream(**_SPACE)
      .loss(process, network, drawn, data, step=_STEP)
      .bound.sum(1)
    )
  )()
  for row in (0, 1):
    np.testing.assert_allclose(bound(9, row), full[row], rtol=1e-5)
    assert abs(float(bound(-1, row)) - float(full[row])) > 1e-3

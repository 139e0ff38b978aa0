"""LLaDA: random lengths in pre-training, answers in fine-tuning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.data.conversations import ConversationRows, Example
from dllm_jax.objectives.llada import LLaDA
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


def test_random_lengths_cut_a_batch_and_hide_the_rest(table):
  objective = LLaDA(**_SPACE, random_length=0.3)
  process = objective.init(_KEY)
  data = toy.batch(np.tile(_X0, (8, 1)))
  draw = jax.jit(
    jax.vmap(
      lambda p, k: objective.draw(p, k, data, step=_STEP).length, (None, 0)
    )
  )
  keys = jax.random.split(_KEY, 300)
  lengths = np.asarray(draw(process, keys))
  assert np.all(lengths == lengths[:, :1])  # one for the batch
  cut = np.mean(lengths[:, 0] < _LENGTH)
  # 0.3 of batches are cut, a quarter of those to the whole length.
  assert abs(cut - 0.225) < 4 * np.sqrt(0.225 * 0.775 / 300)
  whole = draw(objective.unbiased(process), keys)
  assert np.all(np.asarray(whole) == _LENGTH)
  drawn = toy.draw(objective, process, _KEY, data)
  seen = []

  def network(inputs):
    seen.append(inputs.segment_ids)
    return table(inputs)

  def run(process, drawn):
    return objective.loss(process, network, drawn, data, step=_STEP), seen

  two = drawn.replace(length=jnp.asarray(np.full(8, 2)))
  loss, seen = jax.jit(run)(process, two)
  np.testing.assert_array_equal(seen[0], np.tile([1, 1, 0, 0], (8, 1)))
  assert float(loss.weight) == 16.0
  assert not np.any(np.asarray(loss.bound[:, 2:]))


def test_fine_tuning_divides_by_the_length_of_each_answer(table):
  objective = LLaDA(**_SPACE, random_length=0.0, normalisation="sequence")
  supervised = np.array([
    [False, True, True, True],
    [False, False, False, True],
  ])
  data = toy.batch(np.tile(_X0, (2, 1)), loss_mask=supervised)
  process = objective.init(_KEY)
  drawn = toy.draw(objective, process, _KEY, data)
  np.testing.assert_array_equal(
    np.where(supervised, _X0, drawn.z), np.tile(_X0, (2, 1))
  )  # the prompt is never masked
  z = np.where(supervised, _MASK, data.tokens)
  drawn = drawn.replace(t=jnp.asarray([[0.5], [0.25]]), z=jnp.asarray(z))
  loss = toy.loss(objective, process, table, drawn, data)
  log_p = toy.log_p_x0(table, _MASK)
  ce = -np.array([
    [log_p[int(toy.index(row, _VOCAB)), i, _X0[i]] for i in range(_LENGTH)]
    for row in z
  ])
  exact = (ce[0, 1:].sum() / 0.5 / 3 + ce[1, 3] / 0.25 / 1) / 2
  np.testing.assert_allclose(loss.total / loss.weight, exact, rtol=1e-5)


def test_answers_are_filled_with_end_of_text_that_counts():
  end = 2
  rows = ConversationRows(
    [
      Example(np.array(ids), np.arange(len(ids)) >= given)
      for ids, given in (([0, 1, 1], 2), ([0], 1))
    ],
    length=_LENGTH,
    packed=False,
    fill=LLaDA.filling({"fill": "counted", "fill_to": 0}),
    fill_id=end,
  )
  data = toy.batch(np.stack([rows[i].tokens for i in (0, 1)])).replace(
    loss_mask=np.stack([rows[i].mask for i in (0, 1)])
  )
  np.testing.assert_array_equal(data.tokens, [[0, 1, 1, 2], [0, 2, 2, 2]])
  np.testing.assert_array_equal(
    data.loss_mask, [[False, False, True, True], [False, True, True, True]]
  )
  many = jax.tree.map(lambda x: np.tile(x, (200, 1)), data)
  objective = LLaDA(**_SPACE, random_length=0.0, normalisation="sequence")
  drawn = toy.draw(objective, objective.init(_KEY), _KEY, many)
  masked = np.asarray(drawn.z == _MASK)
  assert not np.any(masked[~many.loss_mask])
  assert np.all(masked[many.loss_mask].reshape(200, -1).any(0))

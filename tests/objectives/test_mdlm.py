"""MDLM on an enumerable world: corruption, bound, reverse chain, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.schedule import Cosine, Linear, LogLinear
from dllm_jax.core.types import ModelOutputs
from dllm_jax.objectives.base import Drawn
from dllm_jax.objectives.bd3lm import BD3LM
from dllm_jax.objectives.mdlm import MDLM
from tests.objectives import toy

_LENGTH, _MASK = 4, 3
_X0 = np.array([2, 0, 1, 1])
_OBJECTIVE = MDLM(vocab_size=4, mask_id=_MASK)


@pytest.fixture(scope="module")
def table():
  return toy.Table.random(0, tokens=4, length=_LENGTH)


def _corrupted(objective, key, rows, t):
  """Returns rows of corrupted copies of x0."""
  x0 = np.tile(_X0, (rows, 1))
  times = np.full((rows, 1), t, np.float32)
  process = objective.init(jax.random.key(0))
  return np.asarray(jax.jit(objective.corrupt)(process, key, x0, times))


def test_worked_example_of_a_masking_pattern():
  # [keep, mask, keep, mask] at t = 0.3: 0.7 * 0.3 * 0.7 * 0.3 = 0.0441.
  schedule, t = Linear(), np.float32(0.3)
  keep, mask = schedule.alpha(t), schedule.masked(t)
  assert float(keep * mask * keep * mask) == pytest.approx(0.0441, rel=1e-5)
  objective = MDLM(vocab_size=4, mask_id=_MASK, schedule=schedule)
  n = 200_000
  z = _corrupted(objective, jax.random.key(1), n, t)
  pattern = np.array([False, True, False, True])
  found = np.mean(np.all((z == _MASK) == pattern, axis=1))
  assert abs(found - 0.0441) < 4 * np.sqrt(0.0441 * 0.9559 / n)


def test_worked_example_of_a_loss():
  # t = 0.5, L = 4, predictions 0.8 and 0.6 at the two masked positions:
  # (1 / 0.5) (-log 0.8 - log 0.6) / 4 = 0.367.
  objective = MDLM(vocab_size=4, mask_id=_MASK, schedule=Linear())
  z = jnp.array([[2, _MASK, 1, _MASK]])
  p = np.full((1, 4, 4), 0.1)
  p[0, 1, 0], p[0, 3, 1] = 0.8, 0.6
  p[0, 1, 1:3], p[0, 3, [0, 2]] = 0.1, 0.2
  loss = toy.loss(
    objective,
    objective.init(jax.random.key(0)),
    lambda inputs: ModelOutputs(hidden=jnp.log(jnp.asarray(p, jnp.float32))),
    Drawn(t=jnp.array([[0.5]]), z=z),
    toy.batch(_X0[None]),
  )
  expected = 2 * (-np.log(0.8) - np.log(0.6)) / 4
  assert float(loss.total / loss.weight) == pytest.approx(expected, rel=1e-5)
  assert float(loss.total / loss.weight) == pytest.approx(0.367, abs=5e-4)
  np.testing.assert_allclose(
    loss.bound, [[0, -2 * np.log(0.8), 0, -2 * np.log(0.6)]], rtol=1e-5
  )
  # Kept tokens may count too, in the loss alone: here one of three each.
  kept = toy.loss(
    dataclasses.replace(objective, kept_weight=0.3),
    objective.init(jax.random.key(0)),
    lambda inputs: ModelOutputs(hidden=jnp.log(jnp.asarray(p, jnp.float32))),
    Drawn(t=jnp.array([[0.5]]), z=z),
    toy.batch(_X0[None]),
  )
  copied = 2 * np.log(3)
  np.testing.assert_allclose(kept.total - loss.total, 0.3 * copied, rtol=1e-5)
  np.testing.assert_array_equal(kept.bound, loss.bound)
  assert kept.weight == loss.weight


def test_corruption_masks_at_the_rate_of_the_schedule():
  n = 20_000
  for schedule in (LogLinear(), Cosine(floor=1e-3)):
    objective = MDLM(vocab_size=4, mask_id=_MASK, schedule=schedule)
    for t in (0.1, 0.5, 0.9):
      z = _corrupted(objective, jax.random.key(int(10 * t)), n, t)
      assert np.all((z == _MASK) | (z == _X0))
      rate = float(schedule.masked(np.float32(t)))
      error = np.sqrt(rate * (1 - rate) / n)
      found = np.mean(z == _MASK, axis=0)
      assert np.all(abs(found - rate) < 4 * error)
      both = np.mean((z[:, 0] == _MASK) & (z[:, 1] == _MASK))
      assert abs(both - rate**2) < 4 * np.sqrt(rate**2 / n)


def test_times_are_stratified_above_epsilon():
  t = np.asarray(_OBJECTIVE.time(jax.random.key(0), (1000, 8)))
  assert t.shape == (1000, 1)
  assert t.min() >= 1e-3 and t.max() < 1.0
  u = (t - 1e-3) / (1 - 1e-3)
  # float32 rounding may push a draw over its stratum's end by one.
  assert np.all(abs(np.floor(u.ravel() * 1000) - np.arange(1000)) <= 1)


@pytest.mark.parametrize(
  "schedule", [LogLinear(), Cosine(floor=1e-3)], ids=["loglinear", "cosine"]
)
def test_loss_is_the_enumerated_bound(table, schedule):
  objective = MDLM(
    vocab_size=4, mask_id=_MASK, schedule=schedule, time_epsilon=1e-3
  )
  terms = toy.masked_terms(table, _X0, _MASK)
  exact = toy.bound(terms, _LENGTH, schedule, low=1e-3)
  mean, error = toy.monte_carlo(
    objective,
    objective.init(jax.random.key(0)),
    table,
    _X0,
    rows=512,
    keys=200,
  )
  assert np.all(abs(mean - exact) < 3 * error)
  assert np.all(error < 0.01 * exact)


def test_bound_exceeds_the_likelihood_of_the_any_order_model(table):
  nll = -np.log(toy.any_order(table, _MASK, _LENGTH))
  rows = toy.states(_MASK, _LENGTH)
  assert np.exp(-nll).sum() == pytest.approx(1.0, abs=1e-9)
  for x0, exact in zip(rows[::7], nll[::7], strict=True):
    terms = toy.masked_terms(table, x0, _MASK)
    assert _LENGTH * toy.bound(terms, _LENGTH, Linear()) > exact


def test_uniform_predictor_costs_log_of_the_predictable_tokens():
  uniform = toy.Table(logits=jnp.zeros((4**_LENGTH, _LENGTH, 4)), tokens=4)
  mean, error = toy.monte_carlo(
    _OBJECTIVE,
    _OBJECTIVE.init(jax.random.key(0)),
    uniform,
    _X0,
    rows=512,
    keys=100,
  )
  # Masked tokens are predicted among 3; alpha(1) = 1e-3 and times above 1e-3
  # together leave out at most 2e-3 of log 3.
  assert np.all(abs(mean - np.log(3.0)) < 3 * error + 2e-3 * np.log(3.0))


def test_prompt_and_row_weights_only_count_where_they_should(table):
  data = toy.batch(np.tile(_X0, (6, 1)))
  supervised = np.tile([False, True, True, True], (6, 1))
  weight = np.array([1, 1, 1, 0, 0, 0], np.float32)
  data = data.replace(loss_mask=supervised, loss_weight=weight)
  process = _OBJECTIVE.init(jax.random.key(0))
  drawn = toy.draw(_OBJECTIVE, process, jax.random.key(1), data)
  assert np.array_equal(drawn.z[:, 0], data.tokens[:, 0])
  whole = toy.loss(_OBJECTIVE, process, table, drawn, data)
  assert float(whole.weight) == 9.0
  assert not np.any(np.asarray(whole.bound[:, 0]))
  half = jax.tree.map(lambda x: x[:3], jax.device_get((drawn, data)))
  part = toy.loss(_OBJECTIVE, process, table, *half)
  np.testing.assert_allclose(part.total, whole.total, rtol=1e-6)
  assert float(part.weight) == 9.0


def test_posterior_is_a_distribution_that_copies_what_is_revealed(table):
  rows = jnp.asarray(toy.states(4, _LENGTH))
  t, s = (np.full((len(rows), 1), x, np.float32) for x in (0.7, 0.4))
  log_p = jax.jit(_OBJECTIVE.posterior)(
    _OBJECTIVE.init(jax.random.key(0)), table.logits, rows, t, s
  )
  p = np.exp(np.asarray(log_p, np.float64))
  np.testing.assert_allclose(p.sum(-1), 1.0, atol=1e-6)
  masked = np.asarray(rows) == _MASK
  stay = _OBJECTIVE.schedule.masked(0.4) / _OBJECTIVE.schedule.masked(0.7)
  np.testing.assert_allclose(p[masked][:, _MASK], stay, rtol=1e-5)
  copied = np.take_along_axis(p, np.asarray(rows)[..., None], -1)[..., 0]
  np.testing.assert_array_equal(copied[~masked], 1.0)


@pytest.mark.all
def test_many_reverse_steps_reach_the_any_order_law(table):
  # With few steps several positions are revealed at once; 256 leave 0.01.
  process = _OBJECTIVE.init(jax.random.key(0))
  law = toy.chain(_OBJECTIVE, process, table, _LENGTH, _OBJECTIVE.grid(256))
  rows = toy.states(4, _LENGTH)
  clean = np.all(rows != _MASK, axis=1)
  assert law[~clean].sum() < 1e-12
  exact = toy.any_order(table, _MASK, _LENGTH)
  assert toy.variation(law[clean], exact) < 0.02


@pytest.mark.all
def test_drawn_steps_follow_the_enumerated_chain(table):
  process, times = _OBJECTIVE.init(jax.random.key(0)), _OBJECTIVE.grid(5)
  law = toy.chain(_OBJECTIVE, process, table, _LENGTH, times)
  n = 40_000
  found = toy.drawn(_OBJECTIVE, process, table, _LENGTH, times, rows=n)
  assert np.all(abs(found - law) < 4.5 * np.sqrt(law / n) + 1e-9)


def test_grid_ends_with_noise_removal():
  times = np.asarray(_OBJECTIVE.grid(4))
  assert times.shape == (5,) and times[0] == 1.0 and times[-1] == 0.0
  assert times[-2] == np.float32(1e-5) and np.all(np.diff(times) < 0)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: MDLM(vocab_size=4), "needs a mask_id"),
    (lambda: MDLM(vocab_size=4, mask_id=4), "must lie in"),
    (lambda: MDLM(vocab_size=1, mask_id=0), "at least 2"),
    (
      lambda: MDLM(vocab_size=4, mask_id=3, time_epsilon=1.0),
      "time_epsilon",
    ),
    (
      lambda: MDLM(vocab_size=4, mask_id=3, kept_weight=-1.0),
      "kept_weight must be at least 0, not -1.0",
    ),
    (lambda: MDLM(vocab_size=4, mask_id=3, shift=2), "shift must be 0 or 1"),
    (
      lambda: BD3LM(vocab_size=4, mask_id=3, length=4, block_size=2, shift=1),
      "leave shift 0",
    ),
    (lambda: _OBJECTIVE.grid(0), "at least 1 step"),
  ],
)
def test_impossible_settings_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_reads_time_says_whether_an_output_can_be_kept():
  assert not _OBJECTIVE.reads_time
  told = MDLM(vocab_size=4, mask_id=_MASK, time_conditioning=True)
  assert told.reads_time
  assert told.network_fields() == {"conditioned": True}

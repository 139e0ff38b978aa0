"""Every masked objective against exact sums: its loss, and what it samples."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.schedule import Sine
from dllm_jax.objectives.autoregressive import Autoregressive
from dllm_jax.objectives.bd3lm import (
  BD3LM,
)
from dllm_jax.objectives.dream import Dream
from dllm_jax.objectives.genmd4 import GenMD4
from dllm_jax.objectives.llada import LLaDA
from dllm_jax.objectives.md4 import MD4
from dllm_jax.objectives.mdlm import MDLM
from tests.objectives import toy
from tests.quick import long

_LENGTH, _VOCAB, _MASK = 4, 4, 3
_X0 = np.array([2, 0, 1, 1])
_SPACE = {"vocab_size": _VOCAB, "mask_id": _MASK}
_KEY, _STEP = jax.random.key(0), jnp.int32(0)
_CLIPPED = {"floor": 1e-2, "ceiling": 1.0 - 1e-2}
_EVEN = (np.arange(20_000) + 0.5) / 20_000


@pytest.fixture(scope="module")
def table():
  made = toy.Table.random(1, tokens=_VOCAB, length=_LENGTH)
  # The mask is out of reach, so that "softmax" and "subs" are one.
  return toy.Table(logits=made.logits.at[..., _MASK].set(-40.0), tokens=_VOCAB)


def _close(found, exact, error, *, relative=0.02):
  assert abs(found - exact) < 3 * error, (found, exact, error)
  assert error < relative * abs(exact)  # else the test could not fail


# ---- losses -----------------------------------------------------------------

_TIMED = {
  "MDLM, T = 5": (MDLM(**_SPACE, steps=5, time_epsilon=0.0), None),
  "MDLM, shifted": (MDLM(**_SPACE, shift=1), _EVEN),
  "MDLM, change of variables": (
    MDLM(**_SPACE, time_change="change_of_variables"),
    _EVEN,
  ),
  "MDLM, importance sampling": (
    MDLM(**_SPACE, time_change="importance_sampling"),
    _EVEN,
  ),
  "MD4": (MD4(**_SPACE, schedule=Sine(**_CLIPPED)), _EVEN),
  "MD4, T = 6": (MD4(**_SPACE, steps=6), None),
  "LLaDA": (LLaDA(**_SPACE, random_length=0.0), _EVEN),
  "Dream": (
    Dream(**_SPACE, token_weights="time", normalisation="token"),
    _EVEN,
  ),
}


def _shifted(table):
  logits = np.asarray(table.logits)
  logits = np.concatenate([logits[:, :1], logits[:, :-1]], axis=1)
  return toy.Table(logits=jnp.asarray(logits), tokens=table.tokens)


@pytest.mark.parametrize("name", _TIMED)
@pytest.mark.few(5)
def test_loss_is_the_enumerated_bound(table, name):
  objective, even = _TIMED[name]
  if even is None:
    times = (np.arange(objective.steps) + 1.0) / objective.steps
  else:
    low = objective.time_epsilon
    times = objective.place(jnp.asarray((1.0 - low) * even + low))
  terms = toy.masked_terms(
    _shifted(table) if objective.shift else table, _X0, _MASK
  )
  curve = types.SimpleNamespace(
    alpha=lambda t: 1.0 - objective.masked(t), weight=objective.weight
  )
  exact = toy.bound(terms, _LENGTH, curve, times=times)
  mean, error = toy.monte_carlo(
    objective, objective.init(_KEY), table, _X0, rows=512, keys=150
  )
  ends = objective.end_terms() if isinstance(objective, MD4) else 0.0
  _close(mean[0], exact, error[0])
  _close(mean[1], exact + ends, error[1])


def _block_bound(network, objective, x0):
  """Returns the enumerated bound of a row, block by block, nats per token."""
  size, total = objective.block_size, 0.0
  for start in range(0, _LENGTH, size):
    terms = {}
    for keep in itertools.product((True, False), repeat=size):
      z = x0.copy()
      z[start : start + size][~np.array(keep)] = _MASK
      masked = np.flatnonzero(z == _MASK)
      inputs = objective.two_streams(
        jnp.asarray(z[None]), jnp.ones((1, _LENGTH)), toy.batch(x0[None])
      )
      logits = np.asarray(network(inputs).hidden[0, :_LENGTH], np.float64)
      logits[:, _MASK] = -np.inf
      log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
      terms[tuple(masked)] = -log_p[masked, x0[masked]].sum()
    total += size * toy.bound(
      terms, size, objective.schedule, low=objective.time_epsilon
    )
  return total / _LENGTH


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.few(1)
def test_block_loss_is_the_enumerated_bound(size):
  network = toy.Attention(length=_LENGTH, tokens=_VOCAB)
  objective = BD3LM(**_SPACE, length=_LENGTH, block_size=size)
  exact = _block_bound(network, objective, _X0)
  process = objective.init(_KEY)
  mean, error = toy.monte_carlo(
    objective, process, network, _X0, rows=256, keys=150
  )
  if size == 1:  # t = 1: no variance at all
    np.testing.assert_allclose(mean, exact, rtol=1e-5)
  else:
    _close(mean[0], exact, error[0])
  clipped = objective.clipped(process, (0.3, 0.8))
  if size > 1:  # unbiased() is what evaluation uses, whatever the clip
    back = objective.unbiased(clipped)
    np.testing.assert_allclose(back.state["clip"], [1e-3, 1.0])


def _gen_process(objective):
  return objective.init(_KEY).replace(
    params={"omega": jnp.array([0.3, 1.2, -0.4, 0.0])}
  )


def _gen_exact(objective, table, x0, params, times):
  """Returns E_t sum_z q(z) L(z) + reconstruction, nats per token."""
  process = objective.init(_KEY).replace(params=params)
  keep = toy.states(2, _LENGTH).astype(bool)
  x0 = jnp.broadcast_to(jnp.asarray(x0), keep.shape)
  z = jnp.where(keep, x0, _MASK)

  def at(t):
    t = jnp.full((len(z), 1), t)
    out = table(objective.inputs(process, z, t, toy.batch(z)))
    terms = objective.terms(process, out, x0, z, t).sum(1)
    q = jnp.exp(objective.log_q(process, x0, z, t).sum(1))
    return jnp.sum(q * terms)

  diffusion = jnp.mean(jax.lax.map(at, jnp.asarray(times)))
  end = objective.reconstruction(process, x0[:1]).sum()
  return (diffusion + end) / _LENGTH


@pytest.mark.all
def test_genmd4_loss_and_gradient_are_the_enumerated_ones(table):
  objective = GenMD4(**_SPACE, epsilon=1e-3, time_epsilon=5e-2)
  process = _gen_process(objective)
  low = objective.time_epsilon
  times = low + (1.0 - low) * (np.arange(800) + 0.5) / 800
  exact, gradient = jax.jit(
    jax.value_and_grad(
      lambda params: _gen_exact(objective, table, _X0, params, times)
    )
  )(process.params)
  mean, error = toy.monte_carlo(
    objective, process, table, _X0, rows=256, keys=150
  )
  _close(mean[0], exact, error[0])
  prior = objective.epsilon * np.log(_VOCAB - 1)
  _close(mean[1], exact + prior, error[1])

  data = toy.batch(np.tile(_X0, (256, 1)))

  @jax.jit
  @jax.vmap
  def one(key):
    drawn = objective.draw(process, key, data, step=_STEP)

    def loss(params):
      mine = process.replace(params=params)
      found = objective.loss(mine, table, drawn, data, step=_STEP)
      return found.total / found.weight

    return jax.grad(loss)(process.params)["omega"]

  found = np.asarray(one(jax.random.split(jax.random.key(1), 150)))
  error = found.std(axis=0, ddof=1) / np.sqrt(150)
  exact = np.asarray(gradient["omega"])
  assert np.all(abs(found.mean(axis=0) - exact) < 3 * error + 1e-6)
  assert np.all(error[:3] < 0.2 * abs(exact[:3]).max())
  assert exact[_MASK] == 0.0


def test_genmd4_bound_is_that_of_its_reverse_process(table):
  # The discrete bound of q and the sampler's own p tends to the loss.
  objective = GenMD4(**_SPACE, epsilon=1e-3, time_epsilon=5e-2)
  process = _gen_process(objective)
  keep = toy.states(2, _LENGTH).astype(bool)
  z = jnp.asarray(np.where(keep, _X0, _MASK))
  x0 = jnp.asarray(np.broadcast_to(_X0, z.shape))
  steps, low = 2000, objective.time_epsilon
  times = (low + (1.0 - low) * np.arange(steps + 1) / steps).astype(np.float32)

  def divergence(pair):
    w = objective.powers(process)[x0]
    s, t = (jnp.full((len(z), 1), x) for x in pair)
    out = table(objective.inputs(process, z, t, toy.batch(z)))
    log_p = objective.posterior(process, out.hidden, z, t, s)
    stay = objective.masked(w, s) / objective.masked(w, t)
    log_stay = log_p[..., _MASK]
    log_x0 = jnp.take_along_axis(log_p, x0[..., None], -1)[..., 0]
    kl = stay * (jnp.log(stay) - log_stay)
    kl += (1.0 - stay) * (jnp.log1p(-stay) - log_x0)
    kl = jnp.where(z == _MASK, kl, 0.0).sum(1)
    q = jnp.exp(objective.log_q(process, x0, z, t).sum(1))
    return jnp.sum(q * kl)

  middle = np.asarray((times[:-1] + times[1:]) / 2)

  @jax.jit
  def run():
    discrete = jnp.sum(jax.lax.map(divergence, (times[:-1], times[1:])))
    end = objective.reconstruction(process, x0[:1]).sum()
    exact = _gen_exact(objective, table, _X0, process.params, middle)
    return discrete, end, exact

  discrete, end, exact = jax.device_get(run())
  # The loss is a mean over times; the bound's integral has length 1 - low.
  rate = (exact * _LENGTH - end) * (1.0 - low)
  np.testing.assert_allclose(discrete, rate, rtol=5e-3)


def test_autoregressive_loss_is_the_exact_likelihood():
  objective = Autoregressive(**_SPACE)
  network = toy.Attention(length=_LENGTH + 1, tokens=_VOCAB)
  rows = toy.states(_MASK, _LENGTH)
  data = toy.batch(rows)
  drawn = toy.draw(objective, objective.init(_KEY), _KEY, data)
  loss = toy.loss(objective, objective.init(_KEY), network, drawn, data)
  assert float(loss.weight) == rows.size
  nll = np.asarray(loss.bound, np.float64).sum(1)
  assert np.exp(-nll).sum() == pytest.approx(1.0, abs=1e-5)
  np.testing.assert_array_equal(drawn.z[:, 0], _MASK)
  np.testing.assert_array_equal(drawn.z[:, 1:], rows[:, :-1])


def test_autoregressive_inputs_do_not_cross_segments():
  objective = Autoregressive(vocab_size=9, mask_id=8, bos_id=0)
  data = toy.batch(np.array([[3, 4, 5, 6]]))
  data = data.replace(segment_ids=jnp.array([[1, 1, 2, 2]]))
  drawn = toy.draw(objective, objective.init(_KEY), _KEY, data)
  np.testing.assert_array_equal(drawn.z, [[0, 3, 0, 5]])


# ---- samplers ---------------------------------------------------------------

_SAMPLED = {
  "MDLM, change of variables": MDLM(
    **_SPACE, time_change="change_of_variables"
  ),
  "MD4": MD4(**_SPACE, schedule=Sine(**_CLIPPED)),
  "MD4, mean": MD4(**_SPACE, reverse_draw="mean", spacing="uniform"),
  "LLaDA": LLaDA(**_SPACE),
  "Dream": Dream(**_SPACE),
}


@pytest.mark.parametrize(
  "name",
  [
    "LLaDA",
    *map(long, ("MD4, mean", "MDLM, change of variables", "MD4", "Dream")),
  ],
)
@pytest.mark.all
def test_reverse_steps_reach_the_any_order_law(table, name):
  objective = _SAMPLED[name]
  process = objective.init(_KEY)
  window = np.maximum(np.arange(_LENGTH) - objective.shift, 0)
  read = _shifted(table) if objective.shift else table
  exact = toy.any_order(read, _MASK, _LENGTH)
  clean = np.all(toy.states(_VOCAB, _LENGTH) != _MASK, axis=1)
  law = toy.chain(objective, process, read, _LENGTH, objective.grid(256))
  assert law[~clean].sum() < 1e-6  # the last step leaves no mask
  assert toy.variation(law[clean], exact) < 0.02
  times = objective.grid(4)
  law = toy.chain(objective, process, read, _LENGTH, times)
  n = 20_000
  found = toy.drawn(
    objective, process, table, _LENGTH, times, rows=n, window=window
  )
  assert np.all(abs(found - law) < 4.5 * np.sqrt(law / n) + 1e-7)


@pytest.mark.all
def test_genmd4_samples_its_own_chain(table):
  objective = GenMD4(**_SPACE)
  process = _gen_process(objective)
  times = objective.grid(4)
  law = toy.chain(objective, process, table, _LENGTH, times)
  assert law.sum() == pytest.approx(1.0, abs=1e-5)
  n = 20_000
  found = toy.drawn(objective, process, table, _LENGTH, times, rows=n)
  assert np.all(abs(found - law) < 4.5 * np.sqrt(law / n) + 1e-7)
  # Many steps reveal one token at a time, and the law is bounded by the loss.
  clean = np.all(toy.states(_VOCAB, _LENGTH) != _MASK, axis=1)
  fine = toy.chain(objective, process, table, _LENGTH, objective.grid(128))
  assert fine[~clean].sum() < 1e-6
  even = _EVEN[::20]
  low = objective.time_epsilon
  bound = jax.jit(
    lambda x0: _gen_exact(
      objective, table, x0, process.params, low + (1.0 - low) * even
    )
  )
  for x0 in toy.states(_MASK, _LENGTH)[::20]:
    exact = bound(x0)
    state = int(toy.index(x0, _VOCAB))
    assert _LENGTH * exact > -np.log(fine[state])


@pytest.mark.parametrize("size", [1, long(2)])
def test_blocks_are_sampled_one_after_another(size):
  objective = BD3LM(**_SPACE, length=_LENGTH, block_size=size)
  process = objective.init(_KEY)
  network = toy.Attention(length=_LENGTH, tokens=_VOCAB)
  rows = jnp.asarray(toy.states(_VOCAB, _LENGTH))
  one = np.ones((len(rows), 1), np.float32)
  inputs = objective.inputs(process, rows, one, toy.batch(rows))
  table = toy.Table(logits=network(inputs).hidden, tokens=_VOCAB)
  law, steps = None, 128 if size > 1 else 4  # one slot: any number is exact
  for start in range(0, _LENGTH, size):
    slots = np.arange(_LENGTH)
    free = (slots >= start) & (slots < start + size)
    law = toy.chain(
      objective,
      process,
      table,
      _LENGTH,
      objective.grid(steps),
      law=law,
      free=free,
    )
  inside = [
    itertools.permutations(range(start, start + size))
    for start in range(0, _LENGTH, size)
  ]
  orders = [sum(order, ()) for order in itertools.product(*inside)]
  exact = toy.any_order(table, _MASK, _LENGTH, orders)
  clean = np.all(np.asarray(rows) != _MASK, axis=1)
  assert toy.variation(law[clean], exact) < 0.02
  if size == 1:  # and the loss says the same likelihood
    data = toy.batch(toy.states(_MASK, _LENGTH))
    drawn = toy.draw(objective, process, _KEY, data)
    loss = toy.loss(objective, process, network, drawn, data)
    np.testing.assert_allclose(
      np.exp(-np.asarray(loss.bound).sum(1)), exact, rtol=1e-4
    )


def test_autoregressive_sampling_follows_its_likelihood():
  objective = Autoregressive(**_SPACE)
  process, n = objective.init(_KEY), 40_000
  network = toy.Attention(length=_LENGTH + 1, tokens=_VOCAB)
  one = jnp.ones((n, 1))

  @jax.jit
  def run():
    z = jnp.full((n, _LENGTH + 1), _MASK).at[:, 0].set(objective.begin_id)
    for slot in range(1, _LENGTH + 1):
      out = network(objective.inputs(process, z, one, toy.batch(z)))
      noise = toy.keyed(0, n, 1, step=slot)
      window = jnp.full((n, 1), slot - objective.shift)
      token = objective.reverse(
        process,
        noise,
        out,
        z[:, slot : slot + 1],
        one,
        0 * one,
        window=window,
      )
      z = z.at[:, slot].set(token[:, 0])
    return jnp.bincount(toy.index(z[:, 1:], _MASK), length=_MASK**_LENGTH)

  data = toy.batch(toy.states(_MASK, _LENGTH))
  drawn = toy.draw(objective, process, _KEY, data)
  loss = toy.loss(objective, process, network, drawn, data)
  law = np.exp(-np.asarray(loss.bound, np.float64).sum(1))
  found = np.asarray(run()) / n
  assert np.all(abs(found - law) < 4.5 * np.sqrt(law / n))

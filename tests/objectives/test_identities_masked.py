"""Objectives that are limits or cases of each other, in float64 on a toy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.mask import TwoStream
from dllm_jax.core.schedule import Linear, LogLinear, Sine
from dllm_jax.core.types import ModelOutputs, Process
from dllm_jax.objectives.autoregressive import Autoregressive
from dllm_jax.objectives.base import Drawn
from dllm_jax.objectives.bd3lm import BD3LM
from dllm_jax.objectives.llada import LLaDA
from dllm_jax.objectives.md4 import MD4
from dllm_jax.objectives.mdlm import MDLM
from tests.objectives import toy

_LENGTH, _VOCAB, _MASK = 4, 4, 3
_X0 = np.array([2, 0, 1, 1])
_SPACE = {"vocab_size": _VOCAB, "mask_id": _MASK}


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


def _table(seed=0):
  shape = (_VOCAB**_LENGTH, _LENGTH, _VOCAB)
  logits = np.random.default_rng(seed).normal(size=shape)
  return toy.Table(logits=jnp.asarray(logits, jnp.float64), tokens=_VOCAB)


def _loss(objective, network, t, z, x0=_X0):
  z = jnp.asarray(z)
  rows = len(z)
  t = jnp.asarray(np.full((rows, _LENGTH), t))
  process = objective.init(jax.random.key(0))
  loss = toy.loss(
    objective,
    process,
    network,
    Drawn(t=t, z=z),
    toy.batch(np.tile(x0, (rows, 1))),
  )
  assert loss.bound.dtype == jnp.float64
  return loss


def _maskings():
  keep = toy.states(2, _LENGTH).astype(bool)
  return np.where(keep, _X0, _MASK)


def test_discrete_weight_of_md4_tends_to_one_over_t():
  t = np.linspace(0.05, 1.0, 20)
  schedule = Linear(floor=1e-9, ceiling=1.0 - 1e-9)
  curved = MD4(
    **_SPACE, schedule=Sine(floor=1e-4, ceiling=0.99), steps=1_000_000
  )

  @jax.jit
  def weights(t):
    discrete = [
      MD4(**_SPACE, schedule=schedule, steps=steps).weight(t)
      for steps in (10, 1000, 100_000)
    ]
    return discrete, curved.weight(t), curved.schedule.weight(t)

  discrete, found, expected = jax.device_get(weights(t))
  # Linear: T (alpha(s) - alpha(t)) = 1 for any T, up to the clipped ends.
  assert np.max(np.abs(discrete * t - 1.0)) < 1e-6
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)


def test_discrete_weight_is_the_logit_form_of_the_paper():
  # T expm1(gamma(t) - gamma(s)) alpha(s), gamma = logit alpha, negated.
  objective = MD4(**_SPACE, steps=7)
  t = np.arange(1, 8) / 7
  alpha, weight = jax.jit(objective.schedule.alpha), jax.jit(objective.weight)
  a_t, a_s = (np.asarray(alpha(x)) for x in (t, t - 1 / 7))
  gamma = lambda a: np.log(a) - np.log1p(-a)
  paper = -7 * np.expm1(gamma(a_t) - gamma(a_s)) * a_s
  np.testing.assert_allclose(weight(t), paper, rtol=1e-9)


def test_discrete_bound_tends_to_the_continuous_one():
  network, z = _table(), _maskings()
  continuous = _loss(MDLM(**_SPACE), network, 0.4, z).bound
  discrete = _loss(MDLM(**_SPACE, steps=10**6), network, 0.4, z).bound
  np.testing.assert_allclose(discrete, continuous, rtol=1e-8)


def test_loss_does_not_depend_on_the_floor_of_a_linear_schedule():
  network, z = _table(), _maskings()
  plain = _loss(MDLM(**_SPACE, schedule=Linear()), network, 0.3, z).total
  for objective in (
    MDLM(**_SPACE, schedule=LogLinear()),
    LLaDA(**_SPACE, parameterisation="subs"),
  ):
    if isinstance(objective, LLaDA):
      process = objective.init(jax.random.key(0))
      data = toy.batch(np.tile(_X0, (len(z), 1)))
      like = toy.draw(objective, process, jax.random.key(0), data)
      drawn = like.replace(
        t=jnp.asarray(np.full((len(z), 1), 0.3)),
        z=jnp.asarray(z),
        length=jnp.asarray(np.full(len(z), _LENGTH)),
      )
      found = toy.loss(objective, process, network, drawn, data).total
    else:
      found = _loss(objective, network, 0.3, z).total
    np.testing.assert_allclose(found, plain, rtol=1e-12)


def test_block_of_the_whole_row_is_mdlm():
  network, z = toy.Attention(length=_LENGTH, tokens=_VOCAB), _maskings()
  block = BD3LM(**_SPACE, length=_LENGTH, block_size=_LENGTH)
  whole = MDLM(**_SPACE, schedule=Linear())
  for t in (0.2, 0.9):
    np.testing.assert_allclose(
      _loss(block, network, t, z).bound,
      _loss(whole, network, t, z).bound,
      rtol=1e-12,
    )
  key, data = jax.random.key(3), toy.batch(np.tile(_X0, (16, 1)))
  drawn = [
    jax.device_get(toy.draw(o, o.init(key), key, data)) for o in (block, whole)
  ]
  assert drawn[0].t.shape == (16, _LENGTH) and drawn[1].t.shape == (16, 1)
  assert np.all(drawn[0].t == drawn[0].t[:, :1])
  assert np.array_equal(np.floor(drawn[0].t[:, 0] * 16), np.arange(16))


def test_blocks_of_one_are_autoregressive():
  # A noisy slot sees its own mask and the clean past: the likelihood of
  # p(x_i | x_<i) read at the mask, summed exactly at t = 1.
  network = toy.Attention(length=_LENGTH, tokens=_VOCAB)
  block = BD3LM(**_SPACE, length=_LENGTH, block_size=1)
  process = block.init(jax.random.key(0))
  rows = toy.states(_MASK, _LENGTH)
  data = toy.batch(rows)
  drawn = toy.draw(block, process, jax.random.key(1), data)
  assert np.all(drawn.t == 1.0) and np.all(drawn.z == _MASK)
  drawn = drawn.replace(t=drawn.t.astype(jnp.float64))
  loss = toy.loss(block, process, network, drawn, data)

  def causal(inputs):
    """The same network read one slot at a time, x_<i clean and a mask at i."""
    columns = []
    for i in range(_LENGTH):
      z = np.array(inputs.latent)
      z[:, i:] = _MASK
      prefix = inputs.replace(latent=jnp.asarray(z[:, : i + 1]))
      prefix = prefix.replace(positions=inputs.positions[:, : i + 1])
      columns.append(network(prefix).hidden[:, i])
    return jnp.stack(columns, axis=1)

  logits = causal(block.inputs(process, jnp.asarray(rows), drawn.t, data))
  baseline = Autoregressive(**_SPACE)
  given = lambda inputs: ModelOutputs(hidden=logits)
  exact = toy.loss(
    baseline,
    Process(),
    given,
    toy.draw(baseline, Process(), jax.random.key(0), data),
    data,
  )
  np.testing.assert_allclose(loss.bound, exact.bound, rtol=1e-10)
  nll = np.asarray(loss.bound).sum(1)
  assert np.exp(-nll).sum() == pytest.approx(1.0, abs=1e-10)


def test_clean_stream_leaks_nothing_into_its_own_block():
  network = toy.Attention(length=_LENGTH, tokens=_VOCAB)
  for size in (1, 2, 4):
    block = BD3LM(**_SPACE, length=_LENGTH, block_size=size)
    z = jnp.full((1, _LENGTH), _MASK)
    t = jnp.ones((1, _LENGTH))
    first = network(block.two_streams(z, t, toy.batch(_X0[None])))
    other = _X0.copy()
    other[-1] = 0  # its own block may not see it, nor any earlier one
    second = network(block.two_streams(z, t, toy.batch(other[None])))
    np.testing.assert_array_equal(
      first.hidden[:, :_LENGTH], second.hidden[:, :_LENGTH]
    )
    assert block.two_streams(z, t, toy.batch(_X0[None])).mask == TwoStream(
      _LENGTH, size
    )

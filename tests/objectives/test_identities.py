"""Published systems that are one another in disguise, in float64 on a toy.

Tolerances are float64 rounding where two forms are equal, and 1 / T where one is
the limit of the other.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.schedule import Cosine, Geometric, Linear, LogLinear
from dllm_jax.objectives.d3pm import D3PM
from dllm_jax.objectives.d3pm_schedule import MutualInformation
from dllm_jax.objectives.d3pm_transition import Absorbing, Uniform
from dllm_jax.objectives.gidd import Bump, GIDD, Sigmoid
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.objectives.sedd import SEDD
from dllm_jax.objectives.udlm import UDLM
from tests.objectives import toy

_V = 7
_MASK = _V
_T = 200_000


@pytest.fixture(autouse=True)
def _float64():
  with jax.enable_x64(True):
    yield


_TIMES = np.array([[0.05], [0.3], [0.5], [0.9]])


def _toy(*, mask=False):
  """Returns logits, x0, every z of each x0 and times, `[times, rows, ...]`."""
  width = _V + mask
  rows = [(x, z) for x in range(_V) for z in range(width)]
  if mask:
    rows = [(x, z) for x, z in rows if z in (x, _MASK)]
  x0, z = (np.tile(r, (len(_TIMES), 1)) for r in zip(*rows, strict=True))
  logits = np.random.default_rng(0).normal(size=(*x0.shape, width))
  return 2 * logits, x0, z, _TIMES


def _once(run, *args):
  """Returns what a function returns, compiled as one program."""
  return jax.device_get(jax.jit(run)(*args))


def _equal(a, b, rtol=1e-10, atol=1e-11):
  np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine()], ids=repr)
def test_udlm_is_its_rao_blackwellised_form(schedule):
  udlm = functools.partial(UDLM, vocab_size=_V, schedule=schedule)
  direct, duo = _once(
    lambda *toy: [
      udlm(form=form).token_loss(None, *toy)
      for form in ("direct", "rao_blackwell")
    ],
    *_toy(),
  )
  _equal(direct, duo)


@pytest.mark.parametrize("schedule", [LogLinear(), Geometric()], ids=repr)
def test_udlm_is_sedd_on_the_uniform_graph(schedule):
  sedd = SEDD(
    vocab_size=_V, graph="uniform", scale_by_sigma=False, schedule=schedule
  )

  def run(logits, x0, z, t):
    alpha = schedule.alpha(t)
    uniform = 1.0 - alpha[..., None]
    bar = _V * alpha[..., None] * jax.nn.softmax(logits) + uniform
    bar = jnp.log(bar)
    log_s = bar - jnp.take_along_axis(bar, z[..., None], axis=-1)
    udlm = UDLM(vocab_size=_V, schedule=Linear())
    # The same alpha at another time: losses differ by the rates alone.
    loss = udlm.token_loss(None, logits, x0, z, 1.0 - alpha)
    rate = schedule.dsigma(t) * alpha  # linear: sigma' = 1 / alpha
    return sedd.token_loss(None, log_s, x0, z, t), loss * rate

  _equal(*_once(run, *_toy()), rtol=1e-9, atol=1e-10)


def test_udlm_is_the_limit_of_uniform_d3pm():
  # 1 / (T - n + 1) makes keep_n = 1 - n / T: the linear schedule.
  d3pm = D3PM(vocab_size=_V, transition=Uniform(), steps=_T)
  udlm = functools.partial(UDLM, vocab_size=_V, schedule=Linear())

  def run(process, *toy):
    term, _ = d3pm.token_terms(process, *toy)
    losses = [udlm(steps=steps).token_loss(None, *toy) for steps in (None, _T)]
    return term, *losses

  term, loss, in_steps = _once(run, d3pm.init(jax.random.key(0)), *_toy())
  _equal(_T * term, loss, rtol=2e-4, atol=2e-4)  # O(1 / T) of sums near 10
  _equal(_T * term, in_steps, 1e-6, 1e-6)


def _masked_cross_entropy(logits, x0, z, weight):
  real = jnp.where(jnp.arange(_V + 1) == _MASK, -jnp.inf, logits)
  log_p = jax.nn.log_softmax(real)
  term = -jnp.take_along_axis(log_p, x0[..., None], axis=-1)[..., 0]
  return jnp.where(z == _MASK, weight * term, 0.0)


@pytest.mark.parametrize("schedule", [LogLinear(), Geometric()], ids=repr)
def test_sedd_on_the_absorbing_graph_is_a_cross_entropy(schedule):
  sedd = SEDD(
    vocab_size=_V + 1, mask_id=_MASK, schedule=schedule, scale_by_sigma=False
  )

  def run(logits, x0, z, t):
    real = jnp.where(jnp.arange(_V + 1) == _MASK, -jnp.inf, logits)
    grown = jnp.expm1(schedule.sigma(t))
    said = jax.nn.log_softmax(real) - jnp.log(grown)[..., None]
    log_s = sedd.log_score(said, z, t)
    entropy = sedd.score_entropy(log_s, x0, z, t)
    loss = sedd.token_loss(None, log_s, x0, z, t)
    plain = functools.partial(_masked_cross_entropy, logits, x0, z)
    return (entropy, plain(1.0 / grown)), (loss, plain(schedule.weight(t)))

  for found, expected in _once(run, *_toy(mask=True)):
    _equal(found, expected)


def test_score_that_is_scaled_by_sigma_is_the_same_score():
  plain, scaled = (
    SEDD(vocab_size=_V + 1, mask_id=_MASK, scale_by_sigma=scale)
    for scale in (False, True)
  )

  def run(logits, x0, z, t):
    del x0
    shift = jnp.log(jnp.expm1(plain.schedule.sigma(t))) + jnp.log(1.0 * _V)
    shifted = logits + shift[..., None]
    return scaled.log_score(shifted, z, t), plain.log_score(logits, z, t)

  _equal(*_once(run, *_toy(mask=True)))


def test_absorbing_d3pm_is_mdlm_in_the_limit_and_exactly_in_steps():
  logits, x0, z, _ = _toy(mask=True)
  t = np.array([[0.1], [0.3], [0.5], [0.9]])
  mdlm = MDLM(vocab_size=_V + 1, mask_id=_MASK, schedule=Linear())
  for steps in (10, _T):
    d3pm = D3PM(
      vocab_size=_V + 1,
      mask_id=_MASK,
      transition=Absorbing(),
      schedule=MutualInformation(),
      steps=steps,
    )

    def run(process, logits, x0, z, t, d3pm=d3pm):
      term, _ = d3pm.token_terms(process, logits, x0, z, t)
      weights = mdlm.weigh(None, x0, z, t, toy.batch(np.zeros(x0.shape)))
      plain = functools.partial(_masked_cross_entropy, logits, x0, z)
      return term, plain(1.0 / t), plain(weights.loss)

    process = d3pm.init(jax.random.key(0))
    term, exact, loss = _once(run, process, logits, x0, z, t)
    # T KL = (T / n) CE at every T: linear alpha has no error of discretisation.
    _equal(steps * term, exact, rtol=1e-8, atol=1e-8)
    _equal(exact, loss)


@pytest.mark.parametrize(
  "noise",
  [Bump(uniform=0.0), Sigmoid(offset=-jnp.inf)],
  ids=["bump", "sigmoid"],
)
def test_gidd_without_uniform_noise_is_mdlm(noise):
  gidd = GIDD(vocab_size=_V + 1, mask_id=_MASK, noise=noise)

  def run(logits, x0, z, t):
    expected = _masked_cross_entropy(logits, x0, z, 1.0 / t)
    return gidd.token_loss(None, logits, x0, z, t), expected

  _equal(*_once(run, *_toy(mask=True)))


def test_gidd_without_a_mask_is_udlm():
  gidd = GIDD(vocab_size=_V + 1, mask_id=_MASK, noise=Sigmoid(offset=jnp.inf))
  udlm = UDLM(vocab_size=_V, schedule=Linear())

  def run(logits, *rest):
    wide = jnp.pad(logits, ((0, 0), (0, 0), (0, 1)))
    return gidd.token_loss(None, wide, *rest), udlm.token_loss(
      None, logits, *rest
    )

  _equal(*_once(run, *_toy()))

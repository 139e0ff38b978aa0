"""Published systems that are one another in disguise, in float64 on a toy.

Tolerances are float64 rounding where two forms are equal, and 1 / T where one is
the limit of the other.
"""

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


def _toy(*, mask=False):
  """Returns logits, x0, every z and times of each x0, `[rows, ...]`."""
  width = _V + mask
  rows = [(x, z) for x in range(_V) for z in range(width)]
  if mask:
    rows = [(x, z) for x, z in rows if z in (x, _MASK)]
  x0, z = (jnp.array(r)[None] for r in zip(*rows, strict=True))
  logits = jax.random.normal(jax.random.key(0), (1, len(rows), width))
  return 2 * logits.astype(jnp.float64), x0, z


_TIMES = (0.05, 0.3, 0.5, 0.9)


def _at(t):
  return jnp.array([[t]], jnp.float64)


def _equal(a, b, rtol=1e-10, atol=1e-11):
  np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine()], ids=repr)
def test_udlm_is_its_rao_blackwellised_form(schedule):
  logits, x0, z = _toy()
  for t in _TIMES:
    direct, duo = (
      UDLM(vocab_size=_V, form=form, schedule=schedule).token_loss(
        None, logits, x0, z, _at(t)
      )
      for form in ("direct", "rao_blackwell")
    )
    _equal(direct, duo)


@pytest.mark.parametrize("schedule", [LogLinear(), Geometric()], ids=repr)
def test_udlm_is_sedd_on_the_uniform_graph(schedule):
  logits, x0, z = _toy()
  sedd = SEDD(
    vocab_size=_V, graph="uniform", scale_by_sigma=False, schedule=schedule
  )
  for t in map(_at, _TIMES):
    alpha = schedule.alpha(t)
    bar = jnp.log(_V * alpha * jax.nn.softmax(logits) + 1.0 - alpha)
    log_s = bar - jnp.take_along_axis(bar, z[..., None], axis=-1)
    found = jax.jit(sedd.token_loss)(None, log_s, x0, z, t)
    udlm = UDLM(vocab_size=_V, schedule=Linear())
    # The same alpha at another time: losses differ by the rates alone.
    loss = jax.jit(udlm.token_loss)(None, logits, x0, z, 1.0 - alpha)
    rate = schedule.dsigma(t) * alpha  # linear: sigma' = 1 / alpha
    _equal(found, loss * rate, rtol=1e-9, atol=1e-10)


def test_udlm_is_the_limit_of_uniform_d3pm():
  logits, x0, z = _toy()
  # 1 / (T - n + 1) makes keep_n = 1 - n / T: the linear schedule.
  d3pm = D3PM(vocab_size=_V, transition=Uniform(), steps=_T)
  process = d3pm.init(jax.random.key(0))
  for t in map(_at, _TIMES):
    term, _ = jax.jit(d3pm.token_terms)(process, logits, x0, z, t)
    loss = jax.jit(UDLM(vocab_size=_V, schedule=Linear()).token_loss)(
      None, logits, x0, z, t
    )
    _equal(_T * term, loss, rtol=2e-4, atol=2e-4)  # O(1 / T) of sums near 10
    steps = UDLM(vocab_size=_V, schedule=Linear(), steps=_T)
    _equal(
      _T * term, jax.jit(steps.token_loss)(None, logits, x0, z, t), 1e-6, 1e-6
    )


def _masked_cross_entropy(logits, x0, z, weight):
  real = jnp.where(jnp.arange(_V + 1) == _MASK, -jnp.inf, logits)
  log_p = jax.nn.log_softmax(real)
  term = -jnp.take_along_axis(log_p, x0[..., None], axis=-1)[..., 0]
  return jnp.where(z == _MASK, weight * term, 0.0)


@pytest.mark.parametrize("schedule", [LogLinear(), Geometric()], ids=repr)
def test_sedd_on_the_absorbing_graph_is_a_cross_entropy(schedule):
  logits, x0, z = _toy(mask=True)
  sedd = SEDD(
    vocab_size=_V + 1, mask_id=_MASK, schedule=schedule, scale_by_sigma=False
  )
  real = jnp.where(jnp.arange(_V + 1) == _MASK, -jnp.inf, logits)
  for t in map(_at, _TIMES):
    grown = jnp.expm1(schedule.sigma(t))
    log_s = sedd.log_score(jax.nn.log_softmax(real) - jnp.log(grown), z, t)
    entropy = sedd.score_entropy(log_s, x0, z, t)
    _equal(entropy, _masked_cross_entropy(logits, x0, z, 1.0 / grown))
    loss = jax.jit(sedd.token_loss)(None, log_s, x0, z, t)
    _equal(loss, _masked_cross_entropy(logits, x0, z, schedule.weight(t)))


def test_score_that_is_scaled_by_sigma_is_the_same_score():
  logits, _, z = _toy(mask=True)
  plain, scaled = (
    SEDD(vocab_size=_V + 1, mask_id=_MASK, scale_by_sigma=scale)
    for scale in (False, True)
  )
  t = _at(0.4)
  shift = jnp.log(jnp.expm1(plain.schedule.sigma(t))) + jnp.log(1.0 * _V)
  _equal(scaled.log_score(logits + shift, z, t), plain.log_score(logits, z, t))


def test_absorbing_d3pm_is_mdlm_in_the_limit_and_exactly_in_steps():
  logits, x0, z = _toy(mask=True)
  mdlm = MDLM(vocab_size=_V + 1, mask_id=_MASK, schedule=Linear())
  for steps in (10, _T):
    d3pm = D3PM(
      vocab_size=_V + 1,
      mask_id=_MASK,
      transition=Absorbing(),
      schedule=MutualInformation(),
      steps=steps,
    )
    process = d3pm.init(jax.random.key(0))
    for t in map(_at, (0.1, 0.3, 0.5, 0.9)):
      term, _ = jax.jit(d3pm.token_terms)(process, logits, x0, z, t)
      exact = _masked_cross_entropy(logits, x0, z, 1.0 / t)
      # T KL = (T / n) CE at every T: linear alpha has no error of discretisation.
      _equal(steps * term, exact, rtol=1e-8, atol=1e-8)
      weights = mdlm.weigh(None, x0, z, t, toy.batch(x0))
      _equal(exact, _masked_cross_entropy(logits, x0, z, weights.loss))


@pytest.mark.parametrize(
  "noise",
  [Bump(uniform=0.0), Sigmoid(offset=-jnp.inf)],
  ids=["bump", "sigmoid"],
)
def test_gidd_without_uniform_noise_is_mdlm(noise):
  logits, x0, z = _toy(mask=True)
  gidd = GIDD(vocab_size=_V + 1, mask_id=_MASK, noise=noise)
  for t in map(_at, _TIMES):
    loss = jax.jit(gidd.token_loss)(None, logits, x0, z, t)
    _equal(loss, _masked_cross_entropy(logits, x0, z, 1.0 / t))


def test_gidd_without_a_mask_is_udlm():
  logits, x0, z = _toy()
  gidd = GIDD(vocab_size=_V + 1, mask_id=_MASK, noise=Sigmoid(offset=jnp.inf))
  wide = jnp.pad(logits, ((0, 0), (0, 0), (0, 1)))
  udlm = UDLM(vocab_size=_V, schedule=Linear())
  for t in map(_at, _TIMES):
    loss = jax.jit(gidd.token_loss)(None, wide, x0, z, t)
    _equal(loss, jax.jit(udlm.token_loss)(None, logits, x0, z, t))

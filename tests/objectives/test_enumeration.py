"""Bounds and samplers of D3PM, SEDD, UDLM and GIDD on an enumerable world.

Everything is compared with dense matrices (`enumerated`): the loss that is drawn
with the bound by quadrature over all states, and the reverse chain with the law of
the data where the network is exact.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from dllm_jax.core.schedule import Cosine, Geometric
from dllm_jax.objectives.d3pm import D3PM
from dllm_jax.objectives.d3pm_schedule import LinearBeta
from dllm_jax.objectives.d3pm_transition import (
  Absorbing,
  Band,
  Gaussian,
  MaskUniform,
  Uniform,
)
from dllm_jax.objectives.gidd import Bump, GIDD, Sigmoid
from dllm_jax.objectives.sedd import SEDD
from dllm_jax.objectives.udlm import UDLM
from tests.objectives import enumerated, toy
from tests.quick import long

_N = 3  # real tokens; the mask, where there is one, is id 3
_UNIFORM = np.full(_N, 1 / _N)
_REAL = np.append(_UNIFORM, 0.0)
_MASK = np.eye(_N + 1)[_N]


@dataclasses.dataclass(frozen=True)
class Continuous:
  """A continuous objective and its law q(z_t | x0), written down again."""

  name: str
  objective: Any
  law: Any  # t -> [K, K]
  high: float = 1.0

  @property
  def start(self):
    """The law of one token in the prior."""
    return _MASK if self.objective.mask_id is not None else _UNIFORM


def _uniform_law(alpha):
  return lambda t: enumerated.mixture(alpha(t), (1 - alpha(t)) * _UNIFORM)


def _masked_law(alpha):
  return lambda t: enumerated.mixture(alpha(t), (1 - alpha(t)) * _MASK)


def _bump_law(t, share=0.2):
  c = 2 * share / (1 - share) * np.sqrt(t * (1 - t))
  noise = (t * _MASK + c * _REAL) / (1 + c)
  return enumerated.mixture((1 - t) / (1 + c), noise)


def _sigmoid_law(t, slope=1.5, offset=-0.5):
  share = 1 / (1 + np.exp(-slope * np.log((1 - t) / t) - offset))
  return enumerated.mixture(1 - t, t * (share * _REAL + (1 - share) * _MASK))


_loglinear = lambda t: 1 - (1 - 1e-3) * t
_cosine = lambda t: 1e-3 + (1 - 1e-3) * np.cos(np.pi / 2 * t)
_geometric = lambda t: np.exp(-(1e-3 ** (1 - t)) * 8.0**t)
_GEOMETRIC = Geometric(sigma_min=1e-3, sigma_max=8.0)

_uniform = lambda cls, **fields: cls(vocab_size=_N, **fields)
_masked = lambda cls, **fields: cls(vocab_size=_N + 1, mask_id=_N, **fields)

_SEDD_UNIFORM = dict(graph="uniform", scale_by_sigma=False)
_CONTINUOUS = [
  Continuous("udlm", _uniform(UDLM), _uniform_law(_loglinear)),
  Continuous(
    "udlm-direct-cosine",
    _uniform(UDLM, form="direct", schedule=Cosine(floor=1e-3)),
    _uniform_law(_cosine),
  ),
  Continuous(
    "gidd-bump",
    _masked(GIDD, noise=Bump(uniform=0.2), time_epsilon=1e-3),
    _bump_law,
    high=1 - 1e-3,
  ),
  Continuous(
    "gidd-sigmoid",
    _masked(GIDD, noise=Sigmoid(slope=1.5, offset=-0.5), time_epsilon=1e-3),
    _sigmoid_law,
    high=1 - 1e-3,
  ),
  Continuous("sedd-absorbing", _masked(SEDD), _masked_law(_loglinear)),
  Continuous(
    "sedd-uniform",
    _uniform(SEDD, schedule=_GEOMETRIC, **_SEDD_UNIFORM),
    _uniform_law(_geometric),
  ),
]
_ids = lambda cases: [case.name for case in cases]


def _ratio(case, network, p, rows):
  """Returns t -> s_theta of the table, by the case's parameterisation."""
  if not isinstance(case.objective, SEDD):
    return enumerated.ratios(case.law, p, rows)
  logits = np.asarray(network.logits, np.float64)
  if not case.objective.scale_by_sigma:
    return lambda t: np.exp(logits)
  grown = lambda t: 1 / _loglinear(t) - 1  # expm1(sigma)
  return lambda t: np.exp(logits) / grown(t) / _N


@pytest.mark.parametrize("case", _CONTINUOUS, ids=_ids(_CONTINUOUS))
@pytest.mark.few(3)
def test_drawn_loss_is_the_enumerated_bound(case):
  objective, length = case.objective, 4
  network, p = enumerated.table(
    1, size=objective.vocab_size, length=length, mask_id=objective.mask_id
  )
  rows = toy.states(objective.vocab_size, length)
  x0 = np.array([2, 0, 1, 1])
  exact = enumerated.continuous_bound(
    case.law,
    _ratio(case, network, p, rows),
    x0,
    rows,
    low=objective.time_epsilon,
    high=case.high,
  )
  process = objective.init(jax.random.key(0))
  mean, error = toy.monte_carlo(
    objective, process, network, x0, rows=256, keys=100
  )
  end = case.law(1 - 1e-12)[0]
  prior = 0.0
  if objective.mask_id is None:
    prior = np.sum(end * np.log(end / case.start))
  expected = np.array([exact, exact + prior])
  assert np.all(abs(mean - expected) < 3 * error + 1e-5), (
    mean,
    expected,
    error,
  )
  assert np.all(error < 0.04 * expected)


_PREDICTORS = [
  Continuous(
    f"sedd-{graph}-{predictor}",
    dataclasses.replace(base.objective, predictor=predictor),
    base.law,
  )
  for graph, base in (
    ("absorbing", _CONTINUOUS[-2]),
    ("uniform", _CONTINUOUS[-1]),
  )
  for predictor in ("euler", "analytic", "denoiser")
]
_SAMPLERS = _CONTINUOUS[:4] + _PREDICTORS


def _data(size):
  """Returns a law over rows of two real tokens, far from independent."""
  rows = toy.states(size, 2)
  rng = np.random.default_rng(3)
  real = np.all(rows < _N, axis=1)
  weights = np.where(real, rng.gamma(0.5, size=len(rows)), 0.0)
  return rows, weights / weights.sum()


@pytest.mark.parametrize("case", _SAMPLERS, ids=_ids(_SAMPLERS))
@pytest.mark.few(2)
def test_many_reverse_steps_of_an_exact_network_reach_the_data(case):
  objective = case.objective
  rows, data = _data(objective.vocab_size)
  denoiser = enumerated.true_denoiser(case.law, data, rows)

  def logits(t):
    t = min(float(t), 1 - 1e-6)
    p = denoiser(t)
    if not isinstance(objective, SEDD):
      return np.log(np.maximum(p, 1e-30))
    ratio = enumerated.ratios(case.law, p, rows)(t)
    score = np.log(np.maximum(ratio, 1e-30))
    if objective.scale_by_sigma:
      score += np.log(1 / _loglinear(t) - 1) + np.log(_N)
    return score

  process = objective.init(jax.random.key(0))
  found = enumerated.chain(
    objective, process, logits, rows, objective.grid(128), case.start
  )
  # Positions change on their own within a step: an error of order 1 / 128.
  assert toy.variation(found, data) < 0.02
  if objective.mask_id is not None:
    assert found[np.any(rows == _N, axis=1)].sum() < 1e-6


# ------------------------------------------------------------------------ D3PM


def _linear(steps):
  return np.linspace(0.1, 0.6, steps)


def _dense(kind, beta):
  """Returns one transition matrix, written down again."""
  if kind == "uniform":
    return (1 - beta) * np.eye(_N) + beta / _N
  if kind == "absorbing":
    return enumerated.mixture(1 - beta, beta * _MASK)
  if kind == "mask_uniform":
    one = enumerated.mixture(1 - beta, beta * (0.75 * _MASK + 0.25 * _REAL))
    one[_N] = _MASK
    return one
  if kind == "band":
    near = np.array([[1, 1, 0], [1, 1, 1], [0, 1, 1]])
    return (1 - beta) * np.eye(_N) + beta * near / near.sum(1, keepdims=True)
  # Offsets -2 ... 2 of values -1, 0, 1.
  weight = np.exp(-np.array([0, 1, 4]) / beta)
  weight /= weight[0] + 2 * weight[1:].sum()
  one = weight[abs(np.arange(3)[:, None] - np.arange(3))]
  np.fill_diagonal(one, 0)
  return one + np.diag(1 - one.sum(1))


_KINDS = {
  "uniform": Uniform(),
  "absorbing": Absorbing(),
  "mask_uniform": MaskUniform(mask_fraction=0.75),
  "band": Band(bands=1),
  "gaussian": Gaussian(),
}


def _d3pm(kind, steps, **fields):
  make = _masked if _KINDS[kind].masks else _uniform
  objective = make(
    D3PM,
    transition=_KINDS[kind],
    schedule=LinearBeta(start=0.1, stop=0.6),
    steps=steps,
    cross_entropy=0.0,
    **fields,
  )
  return objective, [_dense(kind, beta) for beta in _linear(steps)]


def _prior(kind, matrices):
  """Returns the model's law of z_T: noise in the proportions of the end."""
  if not _KINDS[kind].masks:
    return _UNIFORM
  masked = np.linalg.multi_dot(matrices)[0, _N]
  return masked * _MASK + (1 - masked) * _REAL


@pytest.mark.parametrize(
  "kind",
  [
    "mask_uniform",
    "gaussian",
    *map(long, ("uniform", "absorbing", "band")),
  ],
)
@pytest.mark.few(1)
def test_drawn_loss_is_the_enumerated_bound_of_d3pm(kind):
  objective, matrices = _d3pm(kind, 5)
  network, p = enumerated.table(
    2, size=objective.vocab_size, length=4, mask_id=objective.mask_id
  )
  rows, x0 = toy.states(objective.vocab_size, 4), np.array([2, 0, 1, 1])
  exact = enumerated.step_bound(matrices, p, x0, rows, _prior(kind, matrices))
  process = objective.init(jax.random.key(0))
  mean, error = toy.monte_carlo(
    objective, process, network, x0, rows=250, keys=64
  )
  assert abs(mean[1] - exact) < 3 * error[1]
  assert error[1] < 0.04 * exact
  end = np.linalg.multi_dot(matrices)[x0]
  prior = _prior(kind, matrices)
  seen = end > 0
  gap = np.sum(end[seen] * np.log((end / prior.clip(1e-300))[seen])) / len(x0)
  assert abs(mean[0] - (exact - gap)) < 3 * error[0]


@pytest.mark.parametrize("kind", _KINDS)
def test_reverse_chain_of_d3pm_is_the_product_of_dense_posteriors(kind):
  objective, matrices = _d3pm(kind, 6)
  size = objective.vocab_size
  network, p = enumerated.table(
    4, size=size, length=2, mask_id=objective.mask_id
  )
  rows = toy.states(size, 2)
  process = objective.init(jax.random.key(0))
  for steps in (6, 2):
    found = enumerated.chain(
        objective, process, lambda t: network.logits, rows,
        objective.grid(steps), _prior(kind, matrices),
    )  # fmt: skip
    law = np.prod(_prior(kind, matrices)[rows], axis=1)
    stride = 6 // steps
    for late in range(6, 0, -stride):
      early = late - stride
      product = lambda parts: np.linalg.multi_dot([
        np.eye(size),
        np.eye(size),
        *parts,
      ])
      f, before = product(matrices[early:late]), product(matrices[:early])
      q = f.T[rows] * (p @ before)
      q /= q.sum(-1, keepdims=True)
      law = law @ np.prod(q[:, np.arange(2), rows], axis=-1)
    np.testing.assert_allclose(found, law, atol=2e-6)


def test_bound_of_d3pm_exceeds_the_likelihood_of_its_sampler():
  objective, matrices = _d3pm("uniform", 4)
  network, p = enumerated.table(5, size=_N, length=2, mask_id=None)
  rows = toy.states(_N, 2)
  process = objective.init(jax.random.key(0))
  law = enumerated.chain(
    objective,
    process,
    lambda t: network.logits,
    rows,
    objective.grid(4),
    _UNIFORM,
  )
  assert law.sum() == pytest.approx(1.0, abs=1e-5)
  for x0, likelihood in zip(rows, law, strict=True):
    bound = enumerated.step_bound(matrices, p, x0, rows, _UNIFORM)
    assert 2 * bound > -np.log(likelihood)


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.few(2)
def test_many_steps_of_d3pm_with_an_exact_network_reach_the_data(kind):
  steps = 96
  make = _masked if _KINDS[kind].masks else _uniform
  objective = make(
    D3PM,
    transition=_KINDS[kind],
    # Slow enough that positions hardly ever change in one step, long enough to
    # forget where they began.
    schedule=LinearBeta(start=1e-3, stop=0.15),
    steps=steps,
  )
  if kind == "gaussian":  # a bell of this width moves at its own pace
    objective = dataclasses.replace(
      objective, schedule=LinearBeta(start=0.1, stop=0.4)
    )
  betas = objective.schedule.betas(steps)
  laws = [np.eye(objective.vocab_size)]
  for beta in betas:
    laws.append(laws[-1] @ _dense(kind, beta))
  law = lambda t: laws[round(float(t) * steps)]
  rows, data = _data(objective.vocab_size)
  denoiser = enumerated.true_denoiser(law, data, rows)
  start = _UNIFORM
  if objective.mask_id is not None:
    start = laws[-1][0, _N] * _MASK + (1 - laws[-1][0, _N]) * _REAL
  found = enumerated.chain(
    objective,
    objective.init(jax.random.key(0)),
    lambda t: np.log(np.maximum(denoiser(t), 1e-30)),
    rows,
    objective.grid(steps),
    start,
  )
  assert toy.variation(found, data) < 0.02


# ----------------------------------------------------------------------- draws

_DRAWN = [
  *(case for case in _CONTINUOUS if case.name != "udlm-direct-cosine"),
  Continuous("d3pm-mix", _d3pm("mask_uniform", 4)[0], None),
  Continuous("d3pm-gaussian", _d3pm("gaussian", 4)[0], None),
]


_FEW = ("udlm", "gidd-bump", "sedd-uniform", "d3pm-mix")


@pytest.mark.parametrize(
  "case",
  [
    (pytest.param if case.name in _FEW else long)(case, id=case.name)
    for case in _DRAWN
  ],
)
@pytest.mark.few(1)
def test_drawn_steps_follow_the_enumerated_chain(case):
  objective, n = case.objective, 20_000
  size = objective.vocab_size
  network, _ = enumerated.table(
    6, size=size, length=2, mask_id=objective.mask_id
  )
  rows, times = toy.states(size, 2), objective.grid(4)
  process, start = objective.init(jax.random.key(0)), case.start
  if case.name == "d3pm-mix":
    start = _prior("mask_uniform", _d3pm("mask_uniform", 4)[1])
  law = enumerated.chain(
    objective, process, lambda t: network.logits, rows, times, start
  )
  found = toy.drawn(objective, process, network, 2, times, rows=n)
  assert np.all(abs(found - law) < 4.5 * np.sqrt(law / n) + 1e-9)

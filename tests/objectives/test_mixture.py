"""What D3PM, SEDD, UDLM and GIDD share: corruption, gradients, memory, refusals."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.schedule import Geometric, Linear, LogLinear
from dllm_jax.core.types import ModelOutputs
from dllm_jax.objectives.base import Drawn, TokenSpace
from dllm_jax.objectives.d3pm import D3PM
from dllm_jax.objectives.d3pm_transition import (
  Absorbing,
  Gaussian,
  MaskUniform,
)
from dllm_jax.objectives.gidd import Bump, GIDD, Sigmoid
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.objectives.mixture import (
  between,
  likelihood,
  log_marginal,
  Parts,
)
from dllm_jax.objectives.sedd import SEDD
from dllm_jax.objectives.udlm import UDLM
from tests import jaxprs
from tests.objectives import toy
from tests.quick import long

_SEDD_UNIFORM = dict(
  graph="uniform", scale_by_sigma=False, schedule=Geometric()
)


def _all(n: int) -> dict:
  """Returns objectives over n real tokens and, where they have one, a mask."""
  mask = dict(vocab_size=n + 1, mask_id=n)
  return {
    "udlm": UDLM(vocab_size=n),
    "udlm-direct": UDLM(vocab_size=n, form="direct"),
    "udlm-steps": UDLM(vocab_size=n, steps=50),
    "sedd-absorbing": SEDD(**mask),
    "sedd-uniform": SEDD(vocab_size=n, **_SEDD_UNIFORM),
    "gidd-bump": GIDD(**mask, noise=Bump(uniform=0.2), weight_clip=10.0),
    "gidd-sigmoid": GIDD(**mask, noise=Sigmoid()),
    "gidd-masks": GIDD(**mask, noise=Bump(uniform=0.0)),
    "d3pm-uniform": D3PM(vocab_size=n),
    "d3pm-absorbing": D3PM(**mask, transition=Absorbing()),
    "d3pm-mix": D3PM(**mask, transition=MaskUniform(), final="network"),
  }


_NAMES = list(_all(5))


@pytest.mark.parametrize("name", [*_NAMES, "d3pm-gaussian"])
@pytest.mark.few(3)
def test_corruption_follows_the_law(name):
  objective = (
    _all(5)
    | {"d3pm-gaussian": D3PM(vocab_size=5, transition=Gaussian(), steps=20)}
  )[name]
  n, size = 20_000, objective.vocab_size
  x0 = np.tile(np.array([[0, 3]]), (n, 1))

  @jax.jit
  def run(process, time):
    z = objective.corrupt(process, jax.random.key(7), x0, time)
    one = jnp.log(jax.nn.one_hot(x0[:1], size))
    if isinstance(objective, D3PM):
      step = objective.step(time[:1])
      law = objective.transition.marginal(
        process.constants, one, step, objective.mask_id
      )
    else:
      parts = objective.parts(time[:1])
      law = jnp.exp(log_marginal(parts, one, objective.mask_id))
    return z, law

  for t in (0.2, 0.8):
    process = objective.init(jax.random.key(0))
    z, law = jax.device_get(run(process, np.full((n, 1), t, np.float32)))
    np.testing.assert_allclose(np.sum(law, -1), 1.0, atol=1e-5)
    for i in range(2):
      found = np.bincount(z[:, i], minlength=size) / n
      error = np.sqrt(law[0, i] * (1 - law[0, i]) / n)
      assert np.all(abs(found - law[0, i]) < 4.5 * error + 1e-6)


@pytest.mark.parametrize("absorbing", [True, False])
def test_jumps_compose(absorbing):
  """Marginals at s, jumped to t, are marginals at t; masks stay if they must."""

  @jax.jit
  def run(early, late):
    jump = between(early, late, absorbing=absorbing)
    f = likelihood(jump, jnp.arange(4), 4, 3, absorbing=absorbing)  # [z, y]
    clean = jnp.log(jnp.eye(4)[:3])
    return f, *(jnp.exp(log_marginal(x, clean, 3)) for x in (early, late))

  early = Parts(*map(np.float32, (0.7, 0.2, 0.1)))
  late = Parts(*map(np.float32, (0.3, 0.35, 0.35)))
  f, at_s, at_t = jax.device_get(run(early, late))
  np.testing.assert_allclose(f.sum(axis=0), 1.0, atol=1e-6)
  np.testing.assert_allclose(at_s @ f.T, at_t, atol=1e-6)
  assert float(f[3, 3]) == pytest.approx(1.0) or not absorbing


def _gradients(objective, data):
  """Returns `(logits, drawn) -> (gradient, bound)` of the mean loss, compiled."""
  process = objective.init(jax.random.key(0))

  def mean(logits, drawn):
    network = lambda inputs: ModelOutputs(hidden=logits)
    loss = objective.loss(process, network, drawn, data, step=jnp.int32(0))
    return loss.total / loss.weight, loss.bound

  return jax.jit(jax.grad(mean, has_aux=True))


_ALIKE = (
  "udlm-direct", "udlm-steps", "gidd-masks", "gidd-sigmoid", "d3pm-mix",
  "sedd-absorbing", "d3pm-absorbing",
)  # fmt: skip


@pytest.mark.parametrize(
  "name", [long(name) if name in _ALIKE else name for name in _NAMES]
)
@pytest.mark.few(1)
def test_gradients_are_finite_and_prompts_cost_nothing(name):
  objective = _all(5)[name]
  x0 = np.tile(np.arange(5), (6, 1))
  supervised = np.broadcast_to(np.arange(5) > 0, x0.shape)
  data = toy.batch(x0, loss_mask=supervised)
  process = objective.init(jax.random.key(0))

  # From the first time to the last, a clean prompt beside fresh noise.
  @jax.jit
  def draws(key):
    drawn = objective.draw(process, key, data, step=jnp.int32(0))
    t = jnp.array([[1e-3], [0.02], [0.3], [0.7], [0.98], [0.9999]])
    z = objective.corrupt(process, key, x0, t)
    return drawn, drawn.replace(t=t, z=jnp.where(supervised, z, x0))

  shape = (*x0.shape, objective.vocab_size)
  logits = 10 * jax.random.normal(jax.random.key(3), shape)  # far from calm
  gradients = _gradients(objective, data)
  for drawn in draws(jax.random.key(1)):
    gradient, bound = gradients(logits, drawn)
    assert np.all(np.isfinite(gradient)) and np.all(np.isfinite(bound))
    assert not np.any(bound[:, 0]) and not np.any(gradient[:, 0])
    assert np.any(gradient)


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.few(6)
def test_posteriors_are_laws_whatever_z(name):
  objective = _all(3)[name]
  size = objective.vocab_size
  z = np.array(list(itertools.product(range(size), repeat=2)))
  logits = 3 * np.random.default_rng(0).normal(size=(*z.shape, size))
  process = objective.init(jax.random.key(0))

  @jax.jit
  def laws(process, logits, t, s):
    log_q = objective.posterior(process, logits, z, t, s)
    log_p = objective.log_x0(process, logits, z, t)
    return jnp.exp(log_q), jnp.exp(log_p)

  for t, s in ((1.0, 0.9), (0.5, 0.4), (0.01, 0.0), (1.0, 0.0)):
    times = (np.full((len(z), 1), x, np.float32) for x in (t, s))
    p, p_x0 = jax.device_get(laws(process, np.float32(logits), *times))
    np.testing.assert_allclose(p.sum(-1), 1.0, atol=1e-5)
    np.testing.assert_allclose(p_x0.sum(-1), 1.0, atol=1e-5)
    if s == 0.0 and objective.mask_id is not None:
      assert np.all(p[z != objective.mask_id][:, objective.mask_id] < 1e-6)


# --------------------------------------------------------------- large vocabulary

_LARGE, _ROWS, _LENGTH, _WIDTH = 50_257, 8, 1024, 128


def _temporary_bytes(objective) -> int:
  """Returns the temporary memory of the loss with its gradients, compiled only."""
  process = jax.eval_shape(objective.init, jax.random.key(0))
  tokens = jax.ShapeDtypeStruct((_ROWS, _LENGTH), jnp.int32)
  flags = jax.ShapeDtypeStruct((_ROWS, _LENGTH), bool)
  data = toy.batch(np.zeros((1, 1), np.int32)).replace(
    tokens=tokens, loss_mask=flags, segment_ids=tokens, positions=tokens
  )
  times = jax.ShapeDtypeStruct((_ROWS, 1), jnp.float32)

  def loss(weights, process, drawn, data):
    network = lambda inputs: ModelOutputs(hidden=weights[0], unembed=weights[1])
    out = objective.loss(process, network, drawn, data, step=jnp.int32(0))
    return out.total / out.weight, out.bound

  shapes = (_ROWS, _LENGTH, _WIDTH), (_WIDTH, objective.vocab_size)
  weights = tuple(jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes)
  compiled = (
    jax
    .jit(jax.value_and_grad(loss, has_aux=True))
    .lower(weights, process, Drawn(t=times, z=tokens), data)
    .compile()
  )
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("name", _NAMES)
def test_corruption_of_a_large_vocabulary_builds_no_row_of_it(name):
  objective = _all(_LARGE)[name]
  process = objective.init(jax.random.key(0))
  rows = jnp.zeros((2, 4), jnp.int32)

  def corrupt(process, key, rows):
    step = jnp.int32(0)
    drawn = objective.draw(process, key, toy.batch(rows), step=step)
    return drawn, objective.corruption(process, rows, drawn.t)

  traced = jax.make_jaxpr(corrupt)(process, jax.random.key(1), rows)
  assert not jaxprs.larger_than(traced, _LARGE)


@pytest.fixture(scope="module")
def mdlm_bytes():
  return _temporary_bytes(MDLM(vocab_size=_LARGE + 1, mask_id=_LARGE))


# One of each kind of loss: a compilation of this size takes seconds.
@pytest.mark.parametrize(
  "name",
  [
    "udlm",
    "d3pm-absorbing",
    *map(
      long,
      (
        "gidd-bump",
        "sedd-absorbing",
        "sedd-uniform",
        "d3pm-uniform",
      ),
    ),
  ],
)
@pytest.mark.few(1)
def test_peak_memory_of_a_large_vocabulary_is_mdlms(name, mdlm_bytes):
  assert _temporary_bytes(_all(_LARGE)[name]) < 1.2 * mdlm_bytes


# ----------------------------------------------------------------------- refusals

_SPACE = TokenSpace(vocab_size=6, mask_id=5)
_INSIDE = TokenSpace(vocab_size=6, mask_id=2)


def test_a_process_without_a_mask_leaves_it_out():
  for cls, fields in (
    (UDLM, {}),
    (D3PM, {}),
    (SEDD, {"graph": "uniform"}),
  ):
    objective = cls.over(_SPACE, **fields)
    assert (objective.vocab_size, objective.mask_id) == (5, None)
    with pytest.raises(
      ValueError, match="mask id 2 lies inside the vocabulary"
    ):
      cls.over(_INSIDE, **fields)
  for cls, fields in (
    (GIDD, {}),
    (SEDD, {}),
    (D3PM, {"transition": Absorbing()}),
  ):
    assert cls.over(_INSIDE, **fields).mask_id == 2


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: UDLM(vocab_size=6, mask_id=5), "mask_id 5 may not lie inside"),
    (lambda: UDLM(vocab_size=6, schedule=Geometric()), "alpha\\(0\\) = 1"),
    (lambda: UDLM(vocab_size=6, steps=0), "steps must be at least 1"),
    (lambda: UDLM(vocab_size=6, form="other"), "unknown form"),
    (lambda: UDLM(vocab_size=6, reconstruction="no"), "unknown recon"),
    (lambda: UDLM(vocab_size=6, time_epsilon=0.7), "time_epsilon"),
    (lambda: UDLM(vocab_size=6).grid(0), "at least 1 step"),
    (lambda: SEDD(vocab_size=6), "needs a mask_id"),
    (
      lambda: SEDD(vocab_size=6, mask_id=5, **_SEDD_UNIFORM),
      "mask_id 5 may not lie inside",
    ),
    (lambda: SEDD(vocab_size=6, graph="uniform"), "scale_by_sigma"),
    (
      lambda: SEDD(vocab_size=6, mask_id=5, schedule=Linear()),
      "finite sigma",
    ),
    (lambda: SEDD(vocab_size=6, mask_id=5, predictor="x"), "unknown pred"),
    (lambda: SEDD(vocab_size=6, mask_id=5, graph="x"), "unknown graph"),
    (lambda: GIDD(vocab_size=6), "needs a mask_id"),
    (lambda: GIDD(vocab_size=6, mask_id=5, noise=LogLinear()), "legal: bump"),
    (lambda: GIDD(vocab_size=6, mask_id=5, weight_clip=0.0), "weight_clip"),
    (lambda: Bump(uniform=1.0), "uniform < 1"),
  ],
)
def test_impossible_settings_are_refused(make, message):
  with pytest.raises(ValueError, match=message) as caught:
    make()
  assert "\n" not in str(caught.value)

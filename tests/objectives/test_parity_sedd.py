"""SEDD against its original: scores, losses and reverse steps, both graphs.

Log-scores to 2e-4, probabilities and losses to 2e-4 relative, as the golden sets
state; noise schedules to 1e-5 relative.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.noise import Recorded, Tag
from dllm_jax.core.schedule import Geometric, LogLinear
from dllm_jax.objectives.mixture import likelihood, Parts
from dllm_jax.objectives.sedd import SEDD
from tests import golden_cases
from tests.objectives import recorded, recorded_dit, toy

_CASES = ("sedd_absorb", "sedd_uniform")
_GUMBEL = 1e-10  # of the originals' rule p / (1e-10 - log(u + 1e-10))


def _schedule(noise):
  if noise["type"] == "loglinear":
    return LogLinear()
  return Geometric(sigma_min=noise["sigma_min"], sigma_max=noise["sigma_max"])


@pytest.fixture(scope="module", params=_CASES)
def case(request):
  found = golden_cases.load(request.param)
  config = found.config["config"]
  absorbing = config["graph"]["type"] == "absorb"
  objective = SEDD(
    vocab_size=found.config["dim"],
    mask_id=found.config["dim"] - 1 if absorbing else None,
    graph="absorbing" if absorbing else "uniform",
    schedule=_schedule(config["noise"]),
    scale_by_sigma=config["model"]["scale_by_sigma"],
  )
  return objective, found.arrays | {"noise": config["noise"]}


@pytest.fixture(scope="module")
def run(case):
  objective, _ = case
  return recorded_dit.network(_CASES[objective.graph == "uniform"])


def _raw(objective, log_score, t):
  """Returns network outputs that the objective turns into the log-scores."""
  if not objective.scale_by_sigma:
    return log_score
  sigma = recorded.told(objective.schedule.sigma, t)
  scale = np.log(np.expm1(sigma)) + np.log(objective.vocab_size - 1)
  return np.float32(log_score + scale[..., None])


def _close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-7)


def test_noise_schedules(case):
  _, g = case
  for name in ("geometric", "loglinear"):
    schedule = _schedule(g["noise"] | {"type": name})
    sigma, dsigma = recorded.told(
      lambda t, s=schedule: (s.sigma(t), s.dsigma(t)), g["grid_t"]
    )
    # sigma = -log1p(-x) near x = 1 - 1e-3 loses 1e-4 relative in float32.
    np.testing.assert_allclose(
      sigma, g[f"noise_{name}_total"], rtol=1e-4, atol=1e-7
    )
    np.testing.assert_allclose(
      dsigma, g[f"noise_{name}_rate"], rtol=2e-4, atol=1e-7
    )


def test_score_and_loss(case):
  objective, g = case
  t = g["t"][:, None]

  def run(logits, x0, z, t):
    log_score = objective.log_score(logits, z, t)
    return (
      log_score,
      (objective.schedule.sigma(t), objective.schedule.dsigma(t)),
      objective.score_entropy(log_score, x0, z, t),
      objective.token_loss(None, logits, x0, z, t),
    )

  log_score, (sigma, dsigma), entropy, loss = recorded.told(
    run, _raw(objective, g["log_score"], t), g["x0"], g["x"], t
  )
  np.testing.assert_allclose(log_score, g["log_score"], atol=2e-4)
  np.testing.assert_allclose(
    np.exp(log_score), g["score"], rtol=2e-4, atol=1e-7
  )
  np.testing.assert_allclose(sigma[:, 0], g["sigma"], rtol=1e-4)
  np.testing.assert_allclose(dsigma[:, 0], g["dsigma"], rtol=1e-4)
  rtol = 2e-4 + _cancellation(objective, g["sigma"])
  expected = g["score_entropy"]
  assert np.all(abs(entropy - expected) <= rtol[:, None] * abs(expected) + 2e-5)
  assert np.all(abs(np.sum(loss, axis=1) - g["loss"]) <= rtol * abs(g["loss"]))


def _cancellation(objective, sigma):
  """Returns the relative rounding error of the original at each time.

  On the uniform graph it takes 1 - V / (expm1(sigma) + V) in float32, which is
  expm1(sigma) / V but for 2^-24: a part in 200 at sigma = 6e-4, V = 50. Ours
  does not cancel.
  """
  if objective.absorbing:
    return np.zeros_like(sigma)
  grown = np.expm1(sigma.astype(np.float64))
  return 2.0**-24 * (grown + objective.vocab_size) / grown


def test_transitions(case):
  objective, g = case

  def run(sigma):
    lost = -jnp.expm1(-sigma)
    none = jnp.zeros_like(lost)
    noise = (none, lost) if objective.absorbing else (lost, none)
    states = jnp.arange(objective.vocab_size)[None]
    return likelihood(
      Parts(1.0 - lost, *noise),
      jnp.tile(states, (len(lost), 1)),
      objective.vocab_size,
      objective.mask_id,
      absorbing=objective.absorbing,
    )

  found = recorded.told(run, g["graph_sigma"])
  np.testing.assert_allclose(
    found, g["transp_transition_rows"], rtol=1e-5, atol=1e-7
  )


def _law(p):
  """Returns a recorded categorical as a law: negative entries are never drawn."""
  p = np.maximum(p, 0.0)
  return p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("predictor", ["euler", "analytic"])
def test_reverse_step(case, predictor):
  objective, g = case
  objective = dataclasses.replace(objective, predictor=predictor)
  t = np.asarray(g["step_t"])
  s = t - g["step_dt"]
  logits = _raw(objective, g["log_score"], t)
  p, drawn = recorded.reverse_step(
    objective, None, logits, g["x"], t, s, g["step_uniform"]
  )
  _close(p, _law(g[f"{predictor}_probs"]))
  golden_cases.same_draws(
    drawn,
    g[f"{predictor}_next"],
    _law(g[f"{predictor}_probs"]) / -np.log(g["step_uniform"] + _GUMBEL),
  )


def _wide(objective, uniform):
  """Returns uniforms with a column for the mask, which the originals cut off."""
  missing = objective.vocab_size - uniform.shape[-1]
  pad = [(0, 0)] * (uniform.ndim - 1) + [(0, missing)]
  return np.pad(uniform, pad, constant_values=0.5)


@functools.lru_cache(maxsize=2)
def _told(objective):
  """Returns `(z, t, batch) -> inputs`, compiled once."""
  return jax.jit(functools.partial(objective.inputs, None))


def _inputs(objective, z, t):
  return _told(objective)(z, t, toy.batch(z))


@pytest.mark.few(1)
def test_denoiser(case, run):
  objective, g = case
  t, uniform = np.asarray(g["denoiser_t"]), g["denoiser_uniform"]
  logits = recorded_dit.logits(run, _inputs(objective, g["x"], t))
  s = np.zeros_like(t)
  p, drawn = recorded.reverse_step(
    objective, None, logits, g["x"], t, s, _wide(objective, uniform)
  )
  tokens = g["denoiser_probs"].shape[-1]
  expected = _law(g["denoiser_probs"])
  # In float32 exp(-sigma) cancels against 1 at large sigma: 1e-6 absolute.
  np.testing.assert_allclose(p[..., :tokens], expected, rtol=5e-4, atol=2e-6)
  assert not np.any(p[..., tokens:])
  golden_cases.same_draws(
    drawn, g["denoiser_next"], expected / -np.log(uniform + _GUMBEL)
  )


@pytest.mark.few(1)
def test_trajectory(case, run):
  objective, g = case
  steps = len(g["traj_history"]) - 2  # predictor steps, then the denoiser
  times = np.append(np.linspace(1.0, 1e-5, steps + 1), 0.0).astype(np.float32)
  np.testing.assert_allclose(objective.grid(steps + 1), times, atol=1e-6)
  z = g["traj_history"][0]
  reverse = jax.jit(
    lambda out, z, t, s, u: objective.reverse(
      None, Recorded(uniforms={Tag.TOKEN: u}, epsilon=_GUMBEL), out, z, t, s
    )
  )
  for i in range(steps + 1):
    t, s = (np.full((len(z), 1), x) for x in times[i : i + 2])
    out = run(_inputs(objective, z, t))
    uniform = _wide(objective, g[f"traj_uniform_{i}"])
    z = np.asarray(reverse(out, z, t, s, uniform))
    np.testing.assert_array_equal(z, g["traj_history"][i + 1])

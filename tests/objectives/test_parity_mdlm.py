"""MDLM against arrays that the published code computed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core import schedule as schedules
from dllm_jax.core.types import Process
from dllm_jax.objectives.base import Drawn
from dllm_jax.objectives.d3pm import D3PM
from dllm_jax.objectives.d3pm_transition import Absorbing
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.objectives.sedd import SEDD
from tests import golden_cases
from tests.objectives import recorded, recorded_dit


@pytest.fixture(scope="module")
def mdlm():
  return golden_cases.load("mdlm")


@pytest.fixture(scope="module")
def said(mdlm):
  """Returns `(z, sigma) -> logits` of the recorded weights, compiled once."""
  run, rows = recorded_dit.network("mdlm"), len(mdlm.arrays["x0"])

  def logits(z, sigma=0.0):
    batch = recorded.batch(np.resize(z, (rows, z.shape[1])))
    told = np.broadcast_to(np.float32(sigma), (rows, 1))
    inputs = _mdlm(mdlm.config).inputs(None, batch.tokens, told, batch)
    found = recorded_dit.logits(run, inputs.replace(conditioning=told))
    return found[: len(z)]

  return logits


def _mdlm_schedules(config):
  ends = config["variants"]["geometric_linear"]
  ends = {k: ends[k] for k in ("sigma_min", "sigma_max")}
  floor = 1e-3  # the originals' own eps, no option of theirs
  return {
    "loglinear": schedules.LogLinear(floor=floor),
    "cosine": schedules.Cosine(floor=floor),
    "cosinesqr": schedules.CosineSquared(floor=floor),
    "geometric": schedules.Geometric(**ends),
    "linear": schedules.SigmaLinear(**ends),
  }


def _mdlm(config, **fields):
  return MDLM(
    vocab_size=config["vocab_size"],
    mask_id=config["mask_index"],
    time_epsilon=config["config"]["training"]["sampling_eps"],
    **fields,
  )


def test_mdlm_schedules(mdlm):
  a = mdlm.arrays
  curves = _mdlm_schedules(mdlm.config)
  found = recorded.told(
    lambda t: {k: (s.sigma(t), s.dsigma(t)) for k, s in curves.items()},
    a["grid_t"],
  )
  for name, values in found.items():
    for ours, theirs in zip(values, ("total", "rate"), strict=True):
      np.testing.assert_allclose(
        ours,
        a[f"noise_{name}_{theirs}"],
        rtol=2e-4,  # float32 near alpha = 1e-3
        atol=1e-7,
        err_msg=f"{name} {theirs}",
      )


@pytest.mark.parametrize("name", ["loglinear", "linear"])
def test_mdlm_importance_times(mdlm, name):
  objective = _mdlm(
    mdlm.config,
    schedule=_mdlm_schedules(mdlm.config)[name],
    time_change="importance_sampling",
  )
  found = recorded.told(objective.place, mdlm.arrays["grid_t_open"])
  expected = mdlm.arrays[f"noise_{name}_importance_transform"]
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_mdlm_times(mdlm, monkeypatch):
  a = mdlm.arrays
  for change, name in (
    ("none", "t_antithetic"),
    ("importance_sampling", "t_importance"),
  ):
    objective = _mdlm(mdlm.config, time_change=change)
    with monkeypatch.context() as patch:
      recorded.replay(patch, a["t_uniform"])
      t = objective.time(jax.random.key(0), (len(a["t_uniform"]), 1))
    np.testing.assert_allclose(t[:, 0], a[name], rtol=1e-4)


@pytest.mark.parametrize("told", [False, True])
def test_mdlm_log_probabilities(mdlm, told):
  a = mdlm.arrays
  logits = a["logits_sigma" if told else "logits_sigma0"]
  found = recorded.told(
    lambda logits, z: _mdlm(mdlm.config).log_x0(Process(), logits, z, None),
    logits,
    a["xt"],
  )
  expected = a[f"logprobs_tc{told}"]
  possible = expected > -1e5  # the originals write -1e6 for -inf
  np.testing.assert_allclose(found[possible], expected[possible], atol=2e-4)
  assert np.all(np.isneginf(found[~possible]))


def test_mdlm_tells_the_network_sigma(mdlm):
  a, objective = mdlm.arrays, _mdlm(mdlm.config, time_conditioning=True)
  schedule = objective.schedule
  found, rate, chance, last = recorded.told(
    lambda t: (
      objective.conditioning(t),
      schedule.dsigma(t),
      objective.masked(t),
      schedule.sigma(jnp.ones(())),
    ),
    a["t"].reshape(-1, 1),
  )
  np.testing.assert_allclose(found[:, 0], a["sigma"], rtol=1e-4)
  np.testing.assert_allclose(rate[:, 0], a["dsigma"], rtol=1e-4)
  np.testing.assert_allclose(chance[:, 0], a["move_chance"], rtol=1e-4)
  # Their name for sigma at time 1e-3 / (1 - 1e-3), whose alpha is 1 - 1e-3.
  np.testing.assert_allclose(last, a["loglinear_sigma_max"], rtol=1e-4)


_MEANS = (
  re.match(r"loss_(subs.*)_mean$", key)
  for key in golden_cases.load("mdlm").arrays
)


@pytest.mark.parametrize("variant", [match[1] for match in _MEANS if match])
@pytest.mark.few(5)
def test_mdlm_loss(mdlm, variant):
  a, config = mdlm.arrays, mdlm.config
  kind = variant.removeprefix("subs").removeprefix("_")
  fields = {
    "tc": {"time_conditioning": True},
    "cov": {"time_change": "change_of_variables"},
    "imp": {"time_change": "importance_sampling"},
    "T": {"steps": config["variants"]["subs_T_and_d3pm_T"]},
  }.get(kind, {})
  if kind in _mdlm_schedules(config):
    fields = {"schedule": _mdlm_schedules(config)[kind]}
  objective = _mdlm(config, **fields)
  network = recorded.network(
    a["logits_sigma" if kind == "tc" else "logits_sigma0"]
  )

  def run(t, z, *batches):
    t = objective.place(t) if kind == "T" else t
    drawn = Drawn(t=t, z=z)
    loss = lambda batch: objective.loss(
      Process(), network, drawn, batch, step=recorded.STEP
    )
    return objective.masked(t), *map(loss, batches)

  masked, whole, loss = recorded.told(
    run,
    a["t"].reshape(-1, 1),
    a["xt"],
    recorded.batch(a["x0"]),
    recorded.batch(a["x0"], a["loss_attention_mask"]),
  )
  np.testing.assert_allclose(
    masked[:, 0], a[f"loss_{variant}_move_chance"].ravel(), rtol=1e-4
  )
  # With T steps the original clamps t to 1 - 1e-4.
  tolerance = 2.5e-4 if kind == "T" else 1e-4
  np.testing.assert_allclose(
    whole.bound, a[f"loss_{variant}"], rtol=tolerance, atol=1e-5
  )
  np.testing.assert_allclose(
    loss.total / loss.weight, a[f"loss_{variant}_mean"], rtol=tolerance
  )


@pytest.mark.parametrize(
  "name", ["ddpm", "ddpm_tc", "ddpm_cache", "analytic", "denoiser"]
)
@pytest.mark.few(3)
def test_mdlm_reverse_step(mdlm, said, name):
  # The Tweedie step of the absorbing graph is the ancestral one; the denoiser's
  # is the one to time 0.
  a, objective = mdlm.arrays, _mdlm(mdlm.config)
  t = a["denoiser_t"] if name == "denoiser" else a["step_t"]
  s = np.zeros_like(t) if name == "denoiser" else t - a["step_dt"]
  u, z, logits = a["step_uniform"], a["xt"], a["logits_sigma0"]
  if name == "ddpm_tc":
    objective = _mdlm(mdlm.config, time_conditioning=True)
    logits = said(z, recorded.told(objective.conditioning, t))
  p, drawn = recorded.reverse_step(objective, Process(), logits, z, t, s, u)
  expected = a[f"{name}_probs"].astype(np.float64)
  masked = z == mdlm.config["mask_index"]
  expected = expected / expected.sum(-1, keepdims=True)
  np.testing.assert_allclose(p[masked], expected[masked], rtol=1e-3, atol=1e-6)
  golden_cases.same_draws(drawn, a[f"{name}_next"], recorded.ratios(p, u))


def test_mdlm_trajectory(mdlm, said):
  """Their whole sampler: steps by recorded draws, then the best tokens."""
  a, objective = mdlm.arrays, _mdlm(mdlm.config)
  history, uniforms = a["traj_history"], a["traj_uniform"]
  times = np.asarray(objective.grid(len(uniforms) + 1))
  for i, u in enumerate(uniforms):
    z = history[i]
    t, s = (np.full((len(z), 1), x) for x in times[i : i + 2])
    p, z = recorded.reverse_step(objective, Process(), said(z), z, t, s, u)
    if i + 1 < len(uniforms):
      golden_cases.same_draws(z, history[i + 1], recorded.ratios(p, u))
  best = recorded.told(
    lambda logits, z: objective.log_x0(Process(), logits, z, None), said(z), z
  )
  np.testing.assert_array_equal(np.argmax(best, -1), history[-1])


def _same_loss(a, name, found, **tolerance):
  """Checks each token's loss, and the mean over the recorded mask."""
  np.testing.assert_allclose(found, a[f"loss_{name}"], **tolerance)
  mask = a["loss_attention_mask"]
  mean = np.sum(found * mask) / mask.sum()
  np.testing.assert_allclose(
    mean, a[f"loss_{name}_mean"], rtol=tolerance["rtol"]
  )


@pytest.mark.parametrize("name", ["d3pm_T", "d3pm_T_subsmask"])
def test_mdlm_in_the_form_of_d3pm(mdlm, said, name):
  """Its discrete bound is D3PM's with absorbing matrices."""
  a, config = mdlm.arrays, mdlm.config
  steps = config["variants"]["subs_T_and_d3pm_T"]
  objective = D3PM(
    vocab_size=config["vocab_size"],
    mask_id=config["mask_index"],
    transition=Absorbing(),
    steps=steps,
    support="tokens" if name.endswith("mask") else "vocabulary",
  )
  t = (np.floor(a["t"].reshape(-1, 1) * steps) + np.float32(1.0)) / steps
  t = np.float32(t)
  # Recorded with a network that is told the rounded time.
  sigma = recorded.told(_mdlm_schedules(config)["loglinear"].sigma, t)

  def run(process, noisy, clean, x0, z, t):
    term, _ = objective.token_terms(process, noisy, x0, z, t)
    # The network that reads the clean text says it again, at a price.
    log_p = objective.log_x0(process, clean, x0, t)
    again = -jnp.take_along_axis(log_p, x0[..., None], axis=-1)[..., 0]
    return term, again, objective.corruption(process, x0, t)[:, 0]

  process, x0, z = objective.init(jax.random.key(0)), a["x0"], a["xt"]
  term, again, chance = recorded.told(
    run, process, said(z, sigma), said(x0), x0, z, t
  )
  np.testing.assert_allclose(
    chance, a[f"loss_{name}_move_chance"].ravel(), rtol=2e-3
  )
  # Their t is clamped to 1 - 1e-4, and log(1 + x) is of float32.
  _same_loss(a, name, steps * term + again, rtol=2.5e-4, atol=2e-4)


@pytest.fixture(scope="module")
def sedd(mdlm):
  return SEDD(
    vocab_size=mdlm.config["vocab_size"],
    mask_id=mdlm.config["mask_index"],
    schedule=_mdlm_schedules(mdlm.config)["loglinear"],
  )


def test_mdlm_in_the_form_of_sedd(mdlm, sedd):
  a = mdlm.arrays
  log_score, mask, found = recorded.told(
    lambda logits, x0, z, t: (
      sedd.log_score(logits, z, t),
      sedd.parts(t).mask,
      sedd.token_loss(None, logits, x0, z, t),
    ),
    *(a["logits_sigma"], a["x0"], a["xt"], a["t"].reshape(-1, 1)),
  )
  np.testing.assert_allclose(log_score, a["logscore_sedd"], atol=2e-4)
  np.testing.assert_allclose(
    mask[:, 0], a["loss_sedd_move_chance"].ravel(), rtol=1e-4
  )
  _same_loss(a, "sedd", found, rtol=2e-4, atol=1e-5)


def test_mdlm_reverse_step_of_sedd(mdlm, said, sedd):
  a, z, u = mdlm.arrays, mdlm.arrays["xt"], mdlm.arrays["step_uniform"]
  t = a["step_t"]
  logits = said(z, recorded.told(sedd.conditioning, t))
  p, drawn = recorded.reverse_step(
    sedd, Process(), logits, z, t, t - a["step_dt"], u
  )
  expected = a["analytic_sedd_probs"].astype(np.float64)
  expected = np.maximum(expected, 0.0)
  expected = expected / expected.sum(-1, keepdims=True)
  np.testing.assert_allclose(p, expected, rtol=1e-3, atol=1e-6)
  golden_cases.same_draws(
    drawn, a["analytic_sedd_next"], recorded.ratios(expected, u)
  )

"""MDLM against arrays that the published code computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core import schedule as schedules
from dllm_jax.core.types import Process
from dllm_jax.objectives.base import Drawn
from dllm_jax.objectives.mdlm import MDLM
from tests import golden_cases
from tests.objectives import recorded


@pytest.fixture(scope="module")
def mdlm():
  return golden_cases.load("mdlm")


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
  t = jnp.asarray(a["grid_t"])
  for name, schedule in _mdlm_schedules(mdlm.config).items():
    for ours, theirs in (("sigma", "total"), ("dsigma", "rate")):
      np.testing.assert_allclose(
        getattr(schedule, ours)(t),
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
  found = objective.place(jnp.asarray(mdlm.arrays["grid_t_open"]))
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
  found = _mdlm(mdlm.config).log_x0(
    Process(), jnp.asarray(logits), jnp.asarray(a["xt"]), None
  )
  expected = a[f"logprobs_tc{told}"]
  possible = expected > -1e5  # the originals write -1e6 for -inf
  np.testing.assert_allclose(
    np.asarray(found)[possible], expected[possible], atol=2e-4
  )
  assert np.all(np.isneginf(np.asarray(found)[~possible]))


def test_mdlm_tells_the_network_sigma(mdlm):
  objective = _mdlm(mdlm.config, time_conditioning=True)
  found = objective.conditioning(recorded.column(mdlm.arrays["t"]))
  np.testing.assert_allclose(found[:, 0], mdlm.arrays["sigma"], rtol=1e-4)


_VARIANTS = (
  "subs",
  "subs_tc",
  "subs_cov",
  "subs_imp",
  "subs_T",
  "subs_cosine",
  "subs_cosinesqr",
  "subs_geometric",
  "subs_linear",
)


@pytest.mark.parametrize("variant", _VARIANTS)
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
  t = recorded.column(a["t"])
  t = objective.place(t) if kind == "T" else t
  np.testing.assert_allclose(
    objective.masked(t)[:, 0],
    a[f"loss_{variant}_move_chance"].ravel(),
    rtol=1e-4,
  )
  logits = a["logits_sigma" if kind == "tc" else "logits_sigma0"]
  drawn = Drawn(t=t, z=jnp.asarray(a["xt"]))
  network, process = recorded.network(logits), Process()
  whole = objective.loss(
    process, network, drawn, recorded.batch(a["x0"]), step=recorded.STEP
  )
  # With T steps the original clamps t to 1 - 1e-4.
  tolerance = 2.5e-4 if kind == "T" else 1e-4
  np.testing.assert_allclose(
    whole.bound, a[f"loss_{variant}"], rtol=tolerance, atol=1e-5
  )
  batch = recorded.batch(a["x0"], a["loss_attention_mask"])
  loss = objective.loss(process, network, drawn, batch, step=recorded.STEP)
  np.testing.assert_allclose(
    loss.total / loss.weight, a[f"loss_{variant}_mean"], rtol=tolerance
  )


@pytest.mark.parametrize("name", ["ddpm", "ddpm_cache", "analytic", "denoiser"])
def test_mdlm_reverse_step(mdlm, name):
  # The Tweedie step of the absorbing graph is the ancestral one; the denoiser's
  # is the one to time 0.
  a, objective = mdlm.arrays, _mdlm(mdlm.config)
  t = a["denoiser_t"] if name == "denoiser" else a["step_t"]
  s = np.zeros_like(t) if name == "denoiser" else t - a["step_dt"]
  u, z = a["step_uniform"], a["xt"]
  p, drawn = recorded.reverse_step(
    objective, Process(), a["logits_sigma0"], z, t, s, u
  )
  expected = a[f"{name}_probs"].astype(np.float64)
  masked = z == mdlm.config["mask_index"]
  expected = expected / expected.sum(-1, keepdims=True)
  np.testing.assert_allclose(p[masked], expected[masked], rtol=1e-3, atol=1e-6)
  golden_cases.same_draws(drawn, a[f"{name}_next"], recorded.ratios(p, u))

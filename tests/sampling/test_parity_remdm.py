"""ReMDM, correctors and Duo's Psi samplers: the law of one step."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.noise import Recorded, Tag
from dllm_jax.sampling.policies.processors import TopP
from dllm_jax.sampling.policies.remasking import (
  Cap,
  Conf,
  FlowCorrector,
  ForwardBackward,
  Loop,
  Moment,
  posterior,
  Rescale,
)
from dllm_jax.sampling.policies.renoising import psi
from tests import golden_cases

CASE = golden_cases.load("remdm")
MASK = CASE.config["mask_index"]
RUNS = CASE.config["runs"]


def rule_of(run):
  sampler = run["sampler"]
  if sampler == "remdm-loop":
    names = ("eta", "t_on", "t_off", "alpha_on")
    return Loop(**{name: run[name] for name in names})
  return {
    "mdlm": lambda: Cap(eta=0.0),
    "remdm-cap": lambda: Cap(eta=run["eta"]),
    "remdm-rescale": lambda: Rescale(eta=run["eta"]),
    "remdm-conf": lambda: Conf(),
    "forward-backward": lambda: ForwardBackward(),
    "dfm": lambda: FlowCorrector(),
  }[sampler]()


def moment(run, memory):
  rows = memory.shape[0]
  t = jnp.full((rows, 1), run["t"])
  dt = run.get("dt") or 1.0 / run["steps"]
  return Moment(
    t=t,
    s=t - dt,
    masked_t=t,
    masked_s=t - dt,
    memory=memory,
    first=t == 1.0,
    step=dt,
  )


@pytest.mark.parametrize(
  "run", RUNS, ids=lambda run: f"{run['sampler']}-{run['t']}"
)
@pytest.mark.few(6)
def test_probabilities_and_draws(run):
  arrays, i = CASE.arrays, run["run"]
  x, memory = jnp.asarray(arrays["x"]), jnp.asarray(arrays["conf_in"])
  p = jnp.asarray(arrays["p_x0"])
  nucleus = run.get("nucleus_p", 1.0)
  log_p = jnp.log(p)
  if nucleus < 1.0:
    log_p = TopP(nucleus, crossing=False)(log_p, x, None)
    log_p -= jnp.log(jnp.sum(jnp.exp(log_p), axis=-1, keepdims=True))
  jump = rule_of(run)(moment(run, memory))
  reveal, remask = (
    jnp.broadcast_to(value, x.shape) for value in (jump.reveal, jump.remask)
  )
  log_q = posterior(log_p, x, reveal, remask, MASK)
  expected = np.maximum(arrays[f"run{i}_probs"], 0.0)  # -1e-6 by rounding.
  total = expected.sum(-1, keepdims=True)
  want = expected / total
  copied = run["sampler"] == "mdlm" or (
    run["sampler"] == "remdm-loop"
    and not run["t_off"] < run["t"] <= run["t_on"]
  )
  if copied:  # The original keeps revealed slots whatever was drawn.
    known = np.asarray(x) != MASK
    want = np.where(known[..., None], np.eye(MASK + 1)[x], want)
  q = np.asarray(jnp.exp(log_q))
  possible = np.ones(x.shape, bool)
  if run["sampler"] == "dfm" and run["t"] == 1.0:
    possible = np.asarray(x) == MASK  # Nothing is revealed at t = 1.
  np.testing.assert_allclose(q[possible], want[possible], rtol=2e-5, atol=1e-6)
  uniform = {Tag.TOKEN: jnp.asarray(arrays["uniform"])}
  noise = Recorded(uniforms=uniform, epsilon=1e-10)
  drawn = noise.categorical(Tag.TOKEN, log_q)
  gumbel = 1e-10 - np.log(np.asarray(arrays["uniform"], np.float64) + 1e-10)
  golden_cases.same_draws(
    np.asarray(drawn)[possible],
    arrays[f"run{i}_xs"][possible],
    (want / gumbel)[possible],
  )
  if f"run{i}_next_t" in arrays:
    np.testing.assert_allclose(
      jump.s[:, 0], arrays[f"run{i}_next_t"], rtol=1e-5
    )


DUO = golden_cases.load("duo").arrays
MIXTURES = [m for m in (re.match(r"psi_(.+)_kappa(.+)$", k) for k in DUO) if m]


@pytest.mark.parametrize("name", MIXTURES, ids=lambda m: m[0])
def test_psi_mixtures(name):
  arrays, state, kappa = DUO, name[1], float(name[2])
  prefix = "" if state == "uniform" else "absorb_"
  log_x = jnp.asarray(arrays[f"{prefix}log_x_theta"])
  back = "posterior_pred" if state == "uniform" else "absorb_posterior"
  x0 = jnp.exp(log_x)
  if state == "uniform":
    x0 = jnp.asarray(arrays["posterior_noise_removal"])
  q = psi(
    jnp.asarray(arrays[back]),
    x0,
    jnp.asarray(arrays["alpha_s"])[:, None],
    jnp.full((log_x.shape[0], 1), kappa),
    None if state == "uniform" else log_x.shape[-1] - 1,
  )
  np.testing.assert_allclose(q, arrays[name[0]], rtol=1e-4, atol=1e-7)

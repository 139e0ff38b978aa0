"""MD4 and GenMD4 against arrays that the published code computed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core import schedule as schedules
from dllm_jax.core.types import ModelOutputs, Process
from dllm_jax.objectives.base import Drawn
from dllm_jax.objectives.genmd4 import GenMD4
from dllm_jax.objectives.md4 import MD4
from tests import golden_cases
from tests.objectives import recorded


@pytest.fixture(scope="module")
def md4():
  return golden_cases.load("md4")


_MD4_VARIANTS = (
  "ct_cos",
  "ct_lin",
  "ct_poly2",
  "dt_lin",
  "dt_cos",
  "ct_lin_not",
  "ct_lin_zero",
)


def _md4_schedule(name):
  ends = {"floor": 1e-4, "ceiling": 1.0 - 1e-4}
  if name.startswith("poly"):
    return schedules.Polynomial(power=float(name[4:]), **ends)
  return {"linear": schedules.Linear, "cosine": schedules.Sine}[name](**ends)


def _md4(case, variant):
  options = case.config["variants"][variant]
  return MD4(
    vocab_size=options["vocab_size"] + 1,
    mask_id=options["vocab_size"],
    schedule=_md4_schedule(options["noise_schedule_type"]),
    steps=None if options["cont_time"] else options["timesteps"],
    time_conditioning=options["time_features"] == "t",
    spacing=options["sampling_grid"],
  )


def test_md4_schedules(md4):
  a = md4.arrays
  names = {m[1] for m in (re.match(r"sched_([^_]+)_alpha$", k) for k in a) if m}
  assert {"linear", "cosine"} <= names
  for name in names:
    schedule, t = _md4_schedule(name), a["grid_t"]
    if name == "poly0.5":  # its slope is infinite at 0
      t = np.maximum(t, 1e-3)
    t = jnp.asarray(t)
    alpha = np.asarray(schedule.alpha(t))
    np.testing.assert_allclose(
      alpha, a[f"sched_{name}_alpha"], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
      schedule.dalpha(t), a[f"sched_{name}_dalpha"], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
      -schedule.weight(t),
      a[f"sched_{name}_dgamma_times_alpha"],
      rtol=2e-3,  # theirs subtracts alpha from 1 in float32
      atol=1e-6,
    )
    log_snr = np.log(alpha) - np.log(schedule.masked(t))
    np.testing.assert_allclose(
      log_snr, a[f"sched_{name}_logsnr"], rtol=1e-3, atol=2e-3
    )


def test_md4_tells_the_network_a_thousand_t(md4):
  """Its sinusoid of t, sines first, is one of what ours is told."""
  a, width = md4.arrays, md4.arrays["t_embedding"].shape[-1]
  told = _md4(md4, "ct_lin").conditioning(recorded.column(a["t"]))
  space = {"vocab_size": 5, "mask_id": 4}
  np.testing.assert_array_equal(
    GenMD4(**space).conditioning(recorded.column(a["t"])), told
  )
  rates = np.exp(-np.log(1e4) * np.arange(width // 2) / (width // 2 - 1))
  angles = np.asarray(told, np.float64) * rates
  found = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
  np.testing.assert_allclose(found, a["t_embedding"], atol=2e-4)


def test_md4_times_share_an_offset(md4, monkeypatch):
  a = md4.arrays
  recorded.replay(monkeypatch, a["antithetic_t0"])
  t = _md4(md4, "ct_lin").time(jax.random.key(0), (len(a["antithetic_t"]), 1))
  np.testing.assert_allclose(t[:, 0], a["antithetic_t"], atol=1e-6)


@pytest.mark.parametrize(
  "variant", [v for v in _MD4_VARIANTS if v.startswith("ct_")]
)
def test_md4_continuous_loss(md4, variant):
  a, objective = md4.arrays, _md4(md4, variant)
  loss = objective.loss(
    Process(),
    recorded.network(recorded.with_mask_column(a[f"{variant}_logits"])),
    Drawn(t=recorded.column(a["t"]), z=jnp.asarray(a["zt"])),
    recorded.batch(a["x"]),
    step=recorded.STEP,
  )
  ends = np.asarray(loss.bound) - np.asarray(
    jnp.where(a["zt"] == objective.mask_id, loss.bound, 0.0)
  )
  np.testing.assert_allclose(  # what is not masked pays the end terms only
    ends[a["zt"] != objective.mask_id], objective.end_terms(), rtol=1e-5
  )
  diffusion = np.asarray(loss.bound - objective.end_terms()).sum(1)
  np.testing.assert_allclose(
    diffusion, a[f"{variant}_loss_diff"], rtol=1e-3, atol=1e-3
  )
  np.testing.assert_allclose(loss.total, diffusion.sum(), rtol=1e-3)


@pytest.mark.parametrize("variant", _MD4_VARIANTS)
def test_md4_reconstruction(md4, variant):
  objective = _md4(md4, variant)
  length = md4.arrays["x"].shape[1]
  prior = objective.schedule.alpha(jnp.float32(1.0)) * np.log(
    objective.vocab_size - 1
  )
  np.testing.assert_allclose(
    length * (objective.end_terms() - prior),
    md4.arrays[f"{variant}_recon"],
    rtol=1e-3,
  )


@pytest.mark.parametrize("variant", _MD4_VARIANTS)
def test_md4_reverse_step(md4, variant):
  # Time-conditioned logits of the step were not recorded: its own
  # probabilities of real tokens say what the network predicted.
  a, objective = md4.arrays, _md4(md4, variant)
  theirs = a[f"{variant}_anc_probs"].astype(np.float64)
  z, u = a["zt"], a["step_uniform"]
  masked = z == objective.mask_id
  steps = md4.config["variants"][variant]["timesteps"]
  s, t = a[f"{variant}_grid_s_t"]
  times = np.asarray(objective.grid(steps))
  np.testing.assert_allclose(
    times[steps // 2 : steps // 2 + 2], [t, s], rtol=1e-5
  )
  if not objective.reads_time:
    logits = recorded.with_mask_column(a[f"{variant}_logits"])
  else:
    logits = np.where(masked[..., None], np.log(theirs + 1e-30), 0.0)
  rows = np.ones((len(z), 1), np.float32)
  args = (z, t * rows, s * rows, u)
  p, drawn = recorded.reverse_step(
    objective, Process(), logits.astype(np.float32), *args
  )
  np.testing.assert_allclose(p[masked], theirs[masked], rtol=1e-3, atol=1e-6)
  golden_cases.same_draws(drawn, a[f"{variant}_anc_zs"], recorded.ratios(p, u))

  kept = a[f"{variant}_topp_probs"]  # the same behind a nucleus of 0.8
  nucleus = np.where(
    masked[..., None], np.log(kept.astype(np.float64) + 1e-30), 0.0
  )
  nucleus[..., objective.mask_id] = 0.0
  p, _ = recorded.reverse_step(
    objective, Process(), nucleus.astype(np.float32), *args
  )
  np.testing.assert_allclose(p[masked], kept[masked], rtol=1e-3, atol=1e-6)


def test_genmd4_terms(md4):
  a, options = md4.arrays, md4.config["variants"]["genmd4"]
  vocab = options["vocab_size"]
  objective = GenMD4(
    vocab_size=vocab + 1, mask_id=vocab, time_epsilon=options["t1"]
  )
  omega = golden_cases.weights("md4")["genmd4_params/noise_schedule/w"]
  process = Process(params={"omega": jnp.append(jnp.asarray(omega), 0.0)})
  x, t, powers = a["x"], recorded.column(a["t"]), objective.powers(process)
  masked = objective.masked(powers, t)[:, :vocab]
  np.testing.assert_allclose(1.0 - masked, a["gen_alpha"], rtol=1e-4)
  dalpha = -masked * powers[:vocab] / t
  np.testing.assert_allclose(dalpha, a["gen_dalpha"], rtol=1e-4)
  np.testing.assert_allclose(
    dalpha / masked, a["gen_dgamma_times_alpha"], rtol=1e-3
  )
  logits = recorded.with_mask_column(a["gen_logits"])
  out = ModelOutputs(hidden=jnp.asarray(logits))
  terms = objective.terms(process, out, jnp.asarray(x), jnp.asarray(a["zt"]), t)
  np.testing.assert_allclose(terms.sum(1), a["gen_loss_1"], rtol=1e-3)
  q = [objective.log_q(process, x, a[z], t).sum(1) for z in ("zt", "zt2")]
  signal = 0.5 * (a["gen_loss_1"] - a["gen_loss_2"])
  np.testing.assert_allclose(
    signal * (q[0] - q[1]), a["gen_reinforce"], rtol=1e-3
  )
  np.testing.assert_allclose(
    objective.reconstruction(process, x).sum(1), a["gen_recon"], rtol=1e-3
  )


def test_genmd4_starts_at_the_published_power(md4):
  options = md4.config["variants"]["genmd4"]
  objective = GenMD4(vocab_size=5, mask_id=4, power=options["power_init"])
  powers = objective.powers(objective.init(jax.random.key(0)))
  np.testing.assert_allclose(powers, options["power_init"], rtol=1e-6)

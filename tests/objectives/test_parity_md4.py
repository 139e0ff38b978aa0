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
from tests import golden_cases, quick
from tests.objectives import recorded, toy


@pytest.fixture(scope="module")
def md4():
  return golden_cases.load("md4")


_OPTIONS = golden_cases.load("md4").config["variants"]
_LEARNED = "genmd4"
_VARIANTS = [name for name in _OPTIONS if name != _LEARNED]
_CONTINUOUS = [name for name in _VARIANTS if _OPTIONS[name]["cont_time"]]


def _shows(variant):
  """Returns what of MD4 a variant shows."""
  options = _OPTIONS[variant]
  names = ("cont_time", "noise_schedule_type", "time_features")
  return {(name, options[name]) for name in names}


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
  assert names
  for name in names:
    schedule, t = _md4_schedule(name), a["grid_t"]
    if isinstance(schedule, schedules.Polynomial) and schedule.power < 1:
      t = np.maximum(t, 1e-3)  # its slope is infinite at 0
    alpha, dalpha, weight, masked = recorded.told(
      lambda t, s=schedule: (s.alpha(t), s.dalpha(t), s.weight(t), s.masked(t)),
      t,
    )
    np.testing.assert_allclose(
      alpha, a[f"sched_{name}_alpha"], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
      dalpha, a[f"sched_{name}_dalpha"], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
      -weight,
      a[f"sched_{name}_dgamma_times_alpha"],
      rtol=2e-3,  # theirs subtracts alpha from 1 in float32
      atol=1e-6,
    )
    log_snr = np.log(alpha) - np.log(masked)
    np.testing.assert_allclose(
      log_snr, a[f"sched_{name}_logsnr"], rtol=1e-3, atol=2e-3
    )


def test_md4_tells_the_network_a_thousand_t(md4):
  """Its sinusoid of t, sines first, is one of what ours is told."""
  a, width = md4.arrays, md4.arrays["t_embedding"].shape[-1]
  told = _md4(md4, _CONTINUOUS[0]).conditioning(recorded.column(a["t"]))
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
  objective = _md4(md4, _CONTINUOUS[0])
  t = objective.time(jax.random.key(0), (len(a["antithetic_t"]), 1))
  np.testing.assert_allclose(t[:, 0], a["antithetic_t"], atol=1e-6)


@pytest.mark.parametrize("variant", quick.few(_CONTINUOUS, _shows))
def test_md4_continuous_loss(md4, variant):
  a, objective = md4.arrays, _md4(md4, variant)
  loss = toy.loss(
    objective,
    Process(),
    recorded.network(recorded.with_mask_column(a[f"{variant}_logits"])),
    Drawn(t=recorded.column(a["t"]), z=jnp.asarray(a["zt"])),
    recorded.batch(a["x"]),
  )
  bound, end_terms = np.asarray(loss.bound), recorded.told(objective.end_terms)
  np.testing.assert_allclose(  # what is not masked pays the end terms only
    bound[a["zt"] != objective.mask_id], end_terms, rtol=1e-5
  )
  diffusion = (bound - end_terms).sum(1)
  np.testing.assert_allclose(
    diffusion, a[f"{variant}_loss_diff"], rtol=1e-3, atol=1e-3
  )
  np.testing.assert_allclose(loss.total, diffusion.sum(), rtol=1e-3)


@pytest.mark.parametrize("variant", quick.few(_VARIANTS, _shows))
def test_md4_reconstruction(md4, variant):
  objective = _md4(md4, variant)
  length = md4.arrays["x"].shape[1]
  last, ends = recorded.told(
    lambda t: (objective.schedule.alpha(t), objective.end_terms()),
    np.float32(1.0),
  )
  prior = last * np.log(objective.vocab_size - 1)
  np.testing.assert_allclose(
    length * (ends - prior),
    md4.arrays[f"{variant}_recon"],
    rtol=1e-3,
  )


@pytest.mark.parametrize("variant", quick.few(_VARIANTS, _shows))
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
  a, options = md4.arrays, md4.config["variants"][_LEARNED]
  vocab = options["vocab_size"]
  objective = GenMD4(
    vocab_size=vocab + 1, mask_id=vocab, time_epsilon=options["t1"]
  )
  omega = golden_cases.weights("md4")["genmd4_params/noise_schedule/w"]
  process = Process(params={"omega": np.append(omega, np.float32(0.0))})
  logits = recorded.with_mask_column(a["gen_logits"])

  def run(process, logits, x, z, other, t):
    powers = objective.powers(process)
    out = ModelOutputs(hidden=logits)
    return (
      powers,
      objective.masked(powers, t)[:, :vocab],
      objective.terms(process, out, x, z, t).sum(1),
      [objective.log_q(process, x, each, t).sum(1) for each in (z, other)],
      objective.reconstruction(process, x).sum(1),
    )

  t = a["t"].reshape(-1, 1)
  powers, masked, terms, q, reconstruction = recorded.told(
    run, process, logits, a["x"], a["zt"], a["zt2"], t
  )
  np.testing.assert_allclose(1.0 - masked, a["gen_alpha"], rtol=1e-4)
  dalpha = -masked * powers[:vocab] / t
  np.testing.assert_allclose(dalpha, a["gen_dalpha"], rtol=1e-4)
  np.testing.assert_allclose(
    dalpha / masked, a["gen_dgamma_times_alpha"], rtol=1e-3
  )
  np.testing.assert_allclose(terms, a["gen_loss_1"], rtol=1e-3)
  signal = 0.5 * (a["gen_loss_1"] - a["gen_loss_2"])
  np.testing.assert_allclose(
    signal * (q[0] - q[1]), a["gen_reinforce"], rtol=1e-3
  )
  np.testing.assert_allclose(reconstruction, a["gen_recon"], rtol=1e-3)


def test_genmd4_starts_at_the_published_power(md4):
  options = md4.config["variants"][_LEARNED]
  objective = GenMD4(vocab_size=5, mask_id=4, power=options["power_init"])
  powers = objective.powers(objective.init(jax.random.key(0)))
  np.testing.assert_allclose(powers, options["power_init"], rtol=1e-6)

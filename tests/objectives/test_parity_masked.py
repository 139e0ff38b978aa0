"""Masked objectives against arrays that their published code computed."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core import schedule as schedules
from dllm_jax.core.mask import TwoStream
from dllm_jax.core.noise import Recorded, Tag
from dllm_jax.core.types import Batch, ModelOutputs, Process
from dllm_jax.objectives.base import Drawn
from dllm_jax.objectives.bd3lm import BD3LM, BlockCosine, Square, SquareRoot
from dllm_jax.objectives.dream import Dream
from dllm_jax.objectives.genmd4 import GenMD4
from dllm_jax.objectives.llada import LLaDA
from dllm_jax.objectives.md4 import MD4
from dllm_jax.objectives.mdlm import MDLM
from tests import golden_cases

_STEP = jnp.int32(0)


def _batch(x0, loss_mask=None):
  x0 = jnp.asarray(x0)
  ones = jnp.ones(x0.shape, bool)
  return Batch(
      tokens=x0,
      loss_mask=ones if loss_mask is None else jnp.asarray(loss_mask, bool),
      segment_ids=ones.astype(jnp.int32),
      positions=jnp.broadcast_to(jnp.arange(x0.shape[1]), x0.shape),
  )


def _network(logits):
  """Returns a network that says the recorded logits."""
  return lambda inputs: ModelOutputs(hidden=jnp.asarray(logits))


def _column(t):
  return jnp.asarray(t).reshape(-1, 1)


def _with_mask_column(logits):
  """Returns logits with a last column for the mask."""
  return np.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, 1)])


def _replay(monkeypatch, *draws):
  """Makes jax.random.uniform return recorded draws, in their order."""
  draws = list(draws)

  def uniform(key, shape=()):
    del key
    return jnp.asarray(draws.pop(0)).reshape(shape)

  monkeypatch.setattr(jax.random, "uniform", uniform)


def _step(objective, process, logits, z, t, s, u):
  """Returns posterior probabilities of a step, and its replayed draw."""
  shape = jnp.asarray(logits).shape
  z, t, s = jnp.asarray(z), jnp.asarray(t), jnp.asarray(s)
  log_p = objective.posterior(process, jnp.asarray(logits), z, t, s)
  noise = Recorded(uniforms={int(Tag.TOKEN): jnp.asarray(u)}, epsilon=1e-10)
  out = ModelOutputs(hidden=jnp.asarray(logits))
  drawn = objective.reverse(process, noise, out, z, t, s)
  assert log_p.shape == shape
  return np.exp(np.asarray(log_p, np.float64)), np.asarray(drawn)


def _ratios(p, u):
  return p / (1e-10 - np.log(u.astype(np.float64) + 1e-10))


# ---- MDLM -------------------------------------------------------------------


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
  for change, name in (("none", "t_antithetic"), (
      "importance_sampling", "t_importance"
  )):
    objective = _mdlm(mdlm.config, time_change=change)
    with monkeypatch.context() as patch:
      _replay(patch, a["t_uniform"])
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
  found = objective.conditioning(_column(mdlm.arrays["t"]))
  np.testing.assert_allclose(found[:, 0], mdlm.arrays["sigma"], rtol=1e-4)


_VARIANTS = (
    "subs", "subs_tc", "subs_cov", "subs_imp", "subs_T", "subs_cosine",
    "subs_cosinesqr", "subs_geometric", "subs_linear",
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
  t = _column(a["t"])
  t = objective.place(t) if kind == "T" else t
  np.testing.assert_allclose(
      objective.masked(t)[:, 0],
      a[f"loss_{variant}_move_chance"].ravel(),
      rtol=1e-4,
  )
  logits = a["logits_sigma" if kind == "tc" else "logits_sigma0"]
  drawn = Drawn(t=t, z=jnp.asarray(a["xt"]))
  network, process = _network(logits), Process()
  whole = objective.loss(
      process, network, drawn, _batch(a["x0"]), step=_STEP
  )
  np.testing.assert_allclose(
      whole.bound, a[f"loss_{variant}"], rtol=1e-4, atol=1e-5
  )
  batch = _batch(a["x0"], a["loss_attention_mask"])
  loss = objective.loss(process, network, drawn, batch, step=_STEP)
  np.testing.assert_allclose(
      loss.total / loss.weight, a[f"loss_{variant}_mean"], rtol=1e-4
  )


@pytest.mark.parametrize("name", ["ddpm", "ddpm_cache", "analytic", "denoiser"])
def test_mdlm_reverse_step(mdlm, name):
  # The Tweedie step of the absorbing graph is the ancestral one; the denoiser's
  # is the one to time 0.
  a, objective = mdlm.arrays, _mdlm(mdlm.config)
  t = a["denoiser_t"] if name == "denoiser" else a["step_t"]
  s = np.zeros_like(t) if name == "denoiser" else t - a["step_dt"]
  u, z = a["step_uniform"], a["xt"]
  p, drawn = _step(objective, Process(), a["logits_sigma0"], z, t, s, u)
  expected = a[f"{name}_probs"].astype(np.float64)
  masked = z == mdlm.config["mask_index"]
  expected = expected / expected.sum(-1, keepdims=True)
  np.testing.assert_allclose(
      p[masked], expected[masked], rtol=1e-3, atol=1e-6
  )
  golden_cases.same_draws(drawn, a[f"{name}_next"], _ratios(p, u))


# ---- MD4 and GenMD4 ---------------------------------------------------------


@pytest.fixture(scope="module")
def md4():
  return golden_cases.load("md4")


_MD4_VARIANTS = (
    "ct_cos", "ct_lin", "ct_poly2", "dt_lin", "dt_cos", "ct_lin_not",
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
  names = {
      m[1] for m in (re.match(r"sched_([^_]+)_alpha$", k) for k in a) if m
  }
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
        -schedule.weight(t), a[f"sched_{name}_dgamma_times_alpha"],
        rtol=2e-3,  # theirs subtracts alpha from 1 in float32
        atol=1e-6,
    )
    log_snr = np.log(alpha) - np.log(schedule.masked(t))
    np.testing.assert_allclose(
        log_snr, a[f"sched_{name}_logsnr"], rtol=1e-3, atol=2e-3
    )


def test_md4_times_share_an_offset(md4, monkeypatch):
  a = md4.arrays
  _replay(monkeypatch, a["antithetic_t0"])
  t = _md4(md4, "ct_lin").time(
      jax.random.key(0), (len(a["antithetic_t"]), 1)
  )
  np.testing.assert_allclose(t[:, 0], a["antithetic_t"], atol=1e-6)


@pytest.mark.parametrize(
    "variant", [v for v in _MD4_VARIANTS if v.startswith("ct_")]
)
def test_md4_continuous_loss(md4, variant):
  a, objective = md4.arrays, _md4(md4, variant)
  loss = objective.loss(
      Process(),
      _network(_with_mask_column(a[f"{variant}_logits"])),
      Drawn(t=_column(a["t"]), z=jnp.asarray(a["zt"])),
      _batch(a["x"]),
      step=_STEP,
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
    logits = _with_mask_column(a[f"{variant}_logits"])
  else:
    logits = np.where(masked[..., None], np.log(theirs + 1e-30), 0.0)
  rows = np.ones((len(z), 1), np.float32)
  args = (z, t * rows, s * rows, u)
  p, drawn = _step(objective, Process(), logits.astype(np.float32), *args)
  np.testing.assert_allclose(
      p[masked], theirs[masked], rtol=1e-3, atol=1e-6
  )
  golden_cases.same_draws(drawn, a[f"{variant}_anc_zs"], _ratios(p, u))

  kept = a[f"{variant}_topp_probs"]  # the same behind a nucleus of 0.8
  nucleus = np.where(
      masked[..., None], np.log(kept.astype(np.float64) + 1e-30), 0.0
  )
  nucleus[..., objective.mask_id] = 0.0
  p, _ = _step(objective, Process(), nucleus.astype(np.float32), *args)
  np.testing.assert_allclose(p[masked], kept[masked], rtol=1e-3, atol=1e-6)


def test_genmd4_terms(md4):
  a, options = md4.arrays, md4.config["variants"]["genmd4"]
  vocab = options["vocab_size"]
  objective = GenMD4(
      vocab_size=vocab + 1, mask_id=vocab, time_epsilon=options["t1"]
  )
  omega = golden_cases.weights("md4")["genmd4_params/noise_schedule/w"]
  process = Process(params={"omega": jnp.append(jnp.asarray(omega), 0.0)})
  x, t, powers = a["x"], _column(a["t"]), objective.powers(process)
  masked = objective.masked(powers, t)[:, :vocab]
  np.testing.assert_allclose(1.0 - masked, a["gen_alpha"], rtol=1e-4)
  dalpha = -masked * powers[:vocab] / t
  np.testing.assert_allclose(dalpha, a["gen_dalpha"], rtol=1e-4)
  np.testing.assert_allclose(
      dalpha / masked, a["gen_dgamma_times_alpha"], rtol=1e-3
  )
  out = ModelOutputs(hidden=jnp.asarray(_with_mask_column(a["gen_logits"])))
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


# ---- BD3-LM -----------------------------------------------------------------


@pytest.fixture(scope="module")
def bd3lm():
  return golden_cases.load("bd3lm")


_BD3_SCHEDULES = {
    "loglinear": schedules.Linear(),
    "square": Square(),
    "square_root": SquareRoot(),
    "log": schedules.Logarithmic(),
    "cosine": BlockCosine(),
}


def _bd3(case, **fields):
  return BD3LM(
      vocab_size=case.config["vocab_size"],
      mask_id=case.config["mask_index"],
      length=case.config["config"]["model"]["length"],
      block_size=case.config["config"]["block_size"],
      time_epsilon=case.config["config"]["training"]["sampling_eps"],
      **fields,
  )


def test_bd3lm_masks(bd3lm):
  names = [re.match(r"mask_n(\d+)_b(\d+)$", k) for k in bd3lm.arrays]
  names = [m for m in names if m]
  assert names
  for m in names:
    slots = jnp.arange(2 * int(m[1]))
    mask = TwoStream(int(m[1]), int(m[2])).allowed(slots[:, None], slots[None])
    np.testing.assert_array_equal(mask, bd3lm.arrays[m[0]])


@pytest.mark.parametrize("name", _BD3_SCHEDULES)
def test_bd3lm_schedules(bd3lm, name):
  a, schedule = bd3lm.arrays, _BD3_SCHEDULES[name]
  t = jnp.asarray(a["grid_t"])
  np.testing.assert_allclose(
      schedule.masked(t), a[f"noise_{name}_move_chance"], rtol=1e-4
  )
  np.testing.assert_allclose(
      -schedule.weight(t),
      a[f"noise_{name}_loss_scale"],
      rtol=1e-3,  # theirs subtracts from 1 in float32
  )


@pytest.mark.parametrize("clip", ["", "_clip"])
def test_bd3lm_times(bd3lm, monkeypatch, clip):
  a, objective = bd3lm.arrays, _bd3(bd3lm)
  process = objective.init(jax.random.key(0))
  if clip:
    process = objective.clipped(process, (0.3, 0.8))
  _replay(monkeypatch, a[f"t_uniform{clip}"])
  t = objective.block_times(process, jax.random.key(0), a["x0"].shape)
  np.testing.assert_allclose(t, a[f"t_sampled{clip}"], rtol=1e-5)


@pytest.mark.parametrize("name", [*_BD3_SCHEDULES, "tc"])
def test_bd3lm_loss(bd3lm, name):
  a = bd3lm.arrays
  schedule = _BD3_SCHEDULES.get(name, _BD3_SCHEDULES["loglinear"])
  objective = _bd3(bd3lm, schedule=schedule, ignore_bos=True)
  # The original resets the first token of xt before it calls the network, the
  # recorded logits did not: where that changes the input, its block is left out.
  mask_id, block = objective.mask_id, objective.block_size
  free = np.ones(a["x0"].shape, bool)
  free[a["xt"][:, 0] == mask_id, :block] = False
  z = a["xt"].copy()
  z[:, 0] = a["x0"][:, 0]
  seen = []

  def network(inputs):
    seen.append(inputs)
    logits = a["logits"]
    return ModelOutputs(hidden=jnp.concatenate([logits, 0.0 * logits], axis=1))

  process = objective.init(jax.random.key(0))
  drawn = Drawn(t=jnp.asarray(a["t"]), z=jnp.asarray(z))
  loss = objective.loss(process, network, drawn, _batch(a["x0"]), step=_STEP)
  if name != "tc":  # the logits that know sigma were recorded at other times
    np.testing.assert_allclose(
        np.asarray(loss.bound)[free], a[f"loss_{name}"][free],
        rtol=1e-3, atol=1e-4,
    )
  (inputs,) = seen
  np.testing.assert_array_equal(
      inputs.latent, np.concatenate([z, a["x0"]], axis=1)
  )
  assert inputs.mask == TwoStream(objective.length, block)
  np.testing.assert_array_equal(
      inputs.positions, np.tile(np.arange(objective.length), (len(z), 2))
  )


def test_bd3lm_mean_leaves_the_first_token_out(bd3lm):
  a, objective = bd3lm.arrays, _bd3(bd3lm, ignore_bos=True)
  batch = _batch(a["x0"], a["loss_attention_mask"])
  process = objective.init(jax.random.key(0))
  drawn = Drawn(t=jnp.asarray(a["t"]), z=jnp.asarray(a["x0"]))
  loss = objective.loss(
      process, _network(np.tile(a["logits"], (1, 2, 1))), drawn, batch,
      step=_STEP,
  )
  assert float(loss.weight) == a["loss_token_mask"].sum()
  mean = (a["loss_loglinear"] * a["loss_token_mask"]).sum() / loss.weight
  np.testing.assert_allclose(mean, a["loss_mean"], rtol=1e-4)


@pytest.mark.parametrize("kind", ["step", "step_nucleus"])
def test_bd3lm_reverse_step(bd3lm, kind):
  a, objective = bd3lm.arrays, _bd3(bd3lm)
  block = objective.block_size
  canvas = a["sample_x"]
  z = canvas[:, -block:]
  masked = z == objective.mask_id
  theirs = a[f"{kind}_probs"].astype(np.float64)
  logits = a["sample_logprobs_uncached"][:, -block:]
  if kind == "step_nucleus":  # what the nucleus left of the predictions
    logits = np.log(theirs + 1e-30).astype(np.float32)
    logits[..., objective.mask_id] = 0.0
    logits = np.where(masked[..., None], logits, 0.0)
  t = a["step_t"]
  p, drawn = _step(
      objective, Process(), logits, z, t, t - a["step_dt"], a["step_uniform"]
  )
  theirs = theirs / theirs.sum(-1, keepdims=True)
  np.testing.assert_allclose(
      p[masked], theirs[masked], rtol=1e-3, atol=1e-6
  )
  golden_cases.same_draws(
      drawn, a[f"{kind}_next"][:, -block:], _ratios(p, a["step_uniform"])
  )


# ---- dLLM: LLaDA, Dream and block diffusion as it trains them ---------------


@pytest.fixture(scope="module")
def dllm():
  return golden_cases.load("dllm")


_DLLM_SCHEDULES = {"linear": schedules.Linear(), "cosine": schedules.Sine()}


def _dllm(case, cls, **fields):
  fields = {
      "vocab_size": case.config["vocab_size"],
      "mask_id": case.config["mask_token_id"],
      "time_epsilon": case.config["time_epsilon"],
      "parameterisation": "softmax",
  } | fields
  if cls is BD3LM:
    fields["length"] = case.arrays["input_ids"].shape[1]
    fields["block_size"] = case.config["block_size"]
  return cls(**fields)


@pytest.mark.parametrize("name", _DLLM_SCHEDULES)
def test_dllm_schedules(dllm, name):
  a, schedule = dllm.arrays, _DLLM_SCHEDULES[name]
  t = jnp.asarray(a["grid_t"])
  for method in ("alpha", "dalpha"):
    np.testing.assert_allclose(
        getattr(schedule, method)(t), a[f"{name}_{method}"],
        rtol=1e-5, atol=1e-6,
    )
  # The original adds 1e-6 to 1 - alpha, which is about 1e-3 at the least here.
  np.testing.assert_allclose(
      schedule.weight(t), a[f"{name}_weight"], rtol=1.5e-3
  )
  objective = _dllm(dllm, LLaDA, schedule=schedule)
  np.testing.assert_allclose(
      objective.stay(t[1:], t[:-1]), a[f"{name}_reverse_mask_prob"], rtol=1e-3
  )


@pytest.mark.parametrize("name", _DLLM_SCHEDULES)
def test_dllm_corruption(dllm, monkeypatch, name):
  a = dllm.arrays
  objective = _dllm(dllm, LLaDA, schedule=_DLLM_SCHEDULES[name])
  t = (1.0 - objective.time_epsilon) * _column(a["uniform_t"])
  t = t + objective.time_epsilon
  _replay(monkeypatch, a["uniform_mask"])
  z = objective.corrupt(Process(), jax.random.key(0), a["input_ids"], t)
  z = np.where(a["labels"] != -100, z, a["input_ids"])
  np.testing.assert_array_equal(z, a[f"noised_{name}"])


def _dllm_loss(case, objective, name, labels, logits):
  a = case.arrays
  t = (1.0 - objective.time_epsilon) * _column(a["uniform_t"])
  drawn = Drawn(
      t=t + objective.time_epsilon, z=jnp.asarray(a[f"noised_{name}"])
  )
  if isinstance(objective, LLaDA):
    like = objective.draw(
        objective.init(jax.random.key(0)), jax.random.key(0),
        _batch(a["input_ids"]), step=_STEP,
    )
    drawn = like.replace(t=drawn.t, z=drawn.z)
    full = jnp.full(len(t), a["input_ids"].shape[1])
    drawn = drawn.replace(length=full)
  # The original's 1e-6 in the weight's denominator, beside rounding.
  tolerance = 1e-5 + 2e-6 / float(objective.schedule.masked(drawn.t).min())
  loss = objective.loss(
      objective.init(jax.random.key(0)), _network(logits), drawn,
      _batch(a["input_ids"], labels != -100), step=_STEP,
  )
  return loss, tolerance


@pytest.mark.parametrize("cls", [LLaDA, BD3LM])
@pytest.mark.parametrize("name", _DLLM_SCHEDULES)
@pytest.mark.parametrize("weighting", ["scheduler", "uniform"])
@pytest.mark.parametrize("rule", ["token", "sequence", "batch"])
def test_dllm_loss(dllm, cls, name, weighting, rule):
  a = dllm.arrays
  objective = _dllm(
      dllm, cls, schedule=_DLLM_SCHEDULES[name], normalisation=rule,
      weighting={"scheduler": "bound"}.get(weighting, weighting),
  )
  kind = "mdlm" if cls is LLaDA else "bd3lm"
  length = a["input_ids"].shape[1]
  logits = a["logits"][:, :length] if cls is LLaDA else a["logits"]
  loss, tolerance = _dllm_loss(dllm, objective, name, a["labels"], logits)
  np.testing.assert_allclose(
      loss.total / loss.weight,
      a[f"loss_{kind}_{name}_{weighting}_{rule}"],
      rtol=tolerance,
  )
  if rule == "token" and weighting == "scheduler":
    np.testing.assert_allclose(
        loss.bound, a[f"token_nll_{kind}_{name}_{weighting}"],
        rtol=tolerance, atol=1e-6,
    )


def test_dllm_shifted_loss(dllm):
  a = dllm.arrays
  objective = _dllm(dllm, Dream, token_weights="time", normalisation="token")
  logits = a["logits"][:, : a["input_ids"].shape[1]]
  loss, tolerance = _dllm_loss(
      dllm, objective, "linear", a["labels_shift"], logits
  )
  np.testing.assert_allclose(
      loss.total / loss.weight, a["loss_mdlm_right_shift"], rtol=tolerance
  )

"""Diffusion-LM against arrays that the original computed."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.noise import Recorded, Tag
from dllm_jax.core.types import ModelOutputs
from dllm_jax.objectives import rounding
from dllm_jax.objectives.diffusion_lm import DiffusionLM, Gaussian
from dllm_jax.objectives.gaussian_steps import betas, law, prior_divergence
from tests import golden_cases
from tests.objectives import recorded

# The original's networks are float32; its README asks for 2e-4, and rtol 1e-3
# for log-variances and the noise parameterisation at small t.
ATOL = 2e-4


@pytest.fixture(scope="module")
def case():
  return golden_cases.load("diffusion_lm")


@pytest.fixture(scope="module")
def objective(case):
  config = case.config
  return DiffusionLM(
    vocab_size=config["vocab_size"],
    features=config["in_channels"],
    steps=config["diffusion_steps"],
    schedule=config["noise_schedule"],
    clamp=False,
  )


@pytest.fixture(scope="module")
def process(objective):
  weights = golden_cases.weights("diffusion_lm")
  fresh = objective.init(jax.random.key(0))
  return fresh.replace(
    params={
      "embedding": jnp.asarray(weights["word_embedding.weight"]),
      "bias": jnp.asarray(weights["lm_head.bias"]),
    }
  )


def times(case):
  """Returns t and s of the recorded steps, and which of them end clean."""
  steps = case.config["diffusion_steps"]
  n = case.arrays["t"].reshape(-1, 1) + np.float32(1.0)
  return n / steps, (n - 1.0) / steps, case.arrays["t"] == 0


def drawn(case):
  arrays = case.arrays
  return Gaussian(
    t=times(case)[0],
    start=jnp.asarray(arrays["noise_x0"]),
    noise=jnp.asarray(arrays["noise"]),
  )


_BETAS = (
  re.match(r"betas_([a-z]+)_?(\d+)?$", key)
  for key in golden_cases.load("diffusion_lm").arrays
)


@pytest.mark.parametrize("name", [m for m in _BETAS if m], ids=lambda m: m[0])
def test_betas(case, name):
  steps = int(name[2] or case.config["diffusion_steps"])
  expected = case.arrays[name[0]]
  np.testing.assert_allclose(betas(name[1], steps), expected, atol=1e-6)


def test_steps(case, objective, process):
  n, arrays = np.arange(1, objective.steps + 1), case.arrays
  one = recorded.told(law, process.constants, n, n - 1)
  kept, lost = (np.asarray(process.constants[x])[1:] for x in ("kept", "lost"))
  close = lambda a, name: np.testing.assert_allclose(
    a, arrays[name], rtol=1e-4, atol=1e-6
  )
  close(one.of_x, "sqrt_posterior_mean_coef1")
  close(one.of_z, "sqrt_posterior_mean_coef2")
  close(one.variance, "sqrt_posterior_variance")
  close(np.sqrt(kept), "sqrt_sqrt_alphas_cumprod")
  close(kept, "sqrt_alphas_cumprod")
  close(np.sqrt(lost), "sqrt_sqrt_one_minus_alphas_cumprod")


def test_laws_of_noisy_latents(case, process):
  """q(x_t | x_start), and q(x_{t-1} | x_t, x_start) at any x_t."""
  arrays = case.arrays
  n, x = arrays["t"][:, None, None] + 1, arrays["x_start"]
  one = recorded.told(law, process.constants, n, n - 1)
  kept, lost = (np.asarray(process.constants[x])[n] for x in ("kept", "lost"))
  close = lambda a, name: np.testing.assert_allclose(
    np.broadcast_to(a, arrays[name].shape), arrays[name], rtol=1e-3, atol=1e-5
  )
  close(np.sqrt(kept) * x, "q_mean")
  close(lost, "q_variance")
  close(np.log(lost), "q_log_variance")
  close(one.of_x * x + one.of_z * arrays["x_t_random"], "post_mean")
  close(one.variance, "post_variance")


def test_corruption(case, objective, process):
  arrays, batch = case.arrays, recorded.batch(case.arrays["input_ids"])
  close = lambda a, name: np.testing.assert_allclose(a, arrays[name], atol=1e-5)
  clean, start, noisy, scaled = recorded.told(
    lambda process, tokens, noise, drawn, t: (
      objective.clean(process, tokens),
      objective.start(process, tokens, noise),
      objective.noisy(process, drawn, batch),
      objective.conditioning(t)[:, 0],
    ),
    *(process, batch.tokens, arrays["noise_x0"], drawn(case), times(case)[0]),
  )
  close(clean, "x_start_mean")
  close(start, "x_start")
  close(noisy, "x_t")
  close(scaled, "scaled_t")


@pytest.mark.parametrize("kind", ["x0", "epsilon"])
def test_loss(case, objective, process, kind):
  arrays, batch = case.arrays, recorded.batch(case.arrays["input_ids"])
  objective = dataclasses.replace(objective, parameterisation=kind)
  told = lambda inputs: ModelOutputs(hidden=jnp.asarray(arrays["model_output"]))
  run = jax.jit(
    lambda process, drawn, row: objective.loss(
      process,
      told,
      drawn,
      batch.replace(loss_weight=row),
      step=recorded.STEP,
    )
  )
  rows = np.eye(len(arrays["t"]), dtype=np.float32)
  losses = [run(process, drawn(case), row) for row in rows]
  name = "eps" if kind == "epsilon" else "x0"
  close = lambda values, expected: np.testing.assert_allclose(
    values, expected, rtol=1e-3, atol=ATOL
  )
  close([x.total / x.weight for x in losses], arrays[f"loss_{name}"])
  metrics = losses[0].metrics
  close(metrics["error"], arrays[f"loss_{name}_mse"].mean())
  close(metrics["end"], arrays["tT_loss"].mean())


def test_loss_of_rounding(case, objective, process):
  arrays = case.arrays
  log_p = recorded.told(
    lambda process, x: objective.log_x0(process, x, None, None),
    process,
    arrays["x_start"],
  )
  ids = arrays["input_ids"][..., None]
  nats = -np.take_along_axis(log_p, ids, axis=-1)[..., 0]
  np.testing.assert_allclose(
    np.mean(nats, axis=1), arrays["decoder_nll"], rtol=1e-4, atol=1e-5
  )


def test_bound_terms(case, objective, process):
  """Their KL of a step is a mean over features, in bits; ours is a sum in nats."""
  arrays = case.arrays
  said, start = arrays["model_output"], arrays["x_start"]
  t, _, clean = times(case)
  mean = arrays["x_start_mean"]
  terms, prior = recorded.told(
    lambda process, mean, start, said, t: (
      objective.divergence(process, mean, start, said, t),
      prior_divergence(process.constants, start),
    ),
    *(process, mean, start, said, t),
  )
  scale = objective.features * np.log(2.0)
  found = np.mean(terms, axis=1) / scale
  np.testing.assert_allclose(
    found[~clean], arrays["vb_kl"][~clean], rtol=1e-3, atol=ATOL
  )
  prior = np.mean(prior, axis=1) / scale
  np.testing.assert_allclose(prior, arrays["vb_kl_T"], rtol=1e-3, atol=1e-5)


def test_rounding(case, objective, process):
  arrays = case.arrays
  names = {"head": "logits", "distance": "logits_mode2"}

  def run(process, x, start):
    ids = rounding.nearest(process.params, x)
    found = {
      name: dataclasses.replace(objective, readout=readout).log_x0(
        process, start, None, None
      )
      for readout, name in names.items()
    }
    return ids, objective.clean(process, ids), found

  ids, rounded, found = recorded.told(
    run, process, arrays["round_in"], arrays["x_start"]
  )
  np.testing.assert_array_equal(ids, arrays["round_ids"])
  np.testing.assert_allclose(rounded, arrays["round_out"], atol=1e-6)
  for name, log_p in found.items():
    logits = arrays[name].astype(np.float64)
    expected = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    np.testing.assert_allclose(log_p, expected, atol=ATOL)


@pytest.mark.parametrize(
  ("name", "fields"),
  [
    ("plain", {}),
    ("round", {"clamp": True}),
    ("small", {"variance": "small"}),
    ("eps", {"parameterisation": "epsilon"}),
  ],
)
def test_step_law(case, objective, process, name, fields):
  arrays, (t, s, clean) = case.arrays, times(case)
  objective = dataclasses.replace(objective, **fields)
  out = ModelOutputs(hidden=arrays["model_output"])
  mean, variance = recorded.told(
    objective.step_law, process, out, arrays["x_t"], t, s
  )
  np.testing.assert_allclose(
    mean, arrays[f"pm_{name}_mean"], rtol=1e-3, atol=ATOL
  )
  expected = arrays[f"pm_{name}_logvar"]
  found = np.broadcast_to(np.log(variance), expected.shape)
  # No noise is added at the last step, whose variance is a convention.
  np.testing.assert_allclose(
    found[~clean], expected[~clean], rtol=1e-3, atol=ATOL
  )


@pytest.mark.parametrize(
  ("name", "fields"),
  [("p_sample", {"clamp": True}), ("ddim_sample", {"predictor": "ddim"})],
)
def test_reverse(case, objective, process, name, fields):
  arrays, (t, s, _) = case.arrays, times(case)
  objective = dataclasses.replace(objective, **fields)
  out = ModelOutputs(hidden=arrays["model_output"])

  def run(process, out, z, t, s, noise):
    uniforms = jax.scipy.special.ndtr(noise)
    noise = Recorded(uniforms={int(Tag.TOKEN): uniforms})
    return objective.reverse(process, noise, out, z, t, s)

  z = recorded.told(run, process, out, arrays["x_t"], t, s, arrays["noise"])
  np.testing.assert_allclose(z, arrays[name], rtol=1e-3, atol=ATOL)

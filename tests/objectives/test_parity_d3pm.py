"""D3PM against its two originals: matrices, posteriors, losses and steps.

Tolerances are those of the golden sets: values 1e-5 relative (matrices were
stored in float32), logits 1e-4, sums of losses 1e-4.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.noise import Recorded, Tag
from dllm_jax.core.types import ModelOutputs
from dllm_jax.objectives.d3pm import D3PM
from dllm_jax.objectives.d3pm_schedule import (
  CosineBeta,
  LinearBeta,
  MutualInformation,
)
from dllm_jax.objectives.d3pm_transition import (
  Absorbing,
  Band,
  Gaussian,
  Uniform,
)
from tests import golden_cases, quick
from tests.objectives import recorded

_IMAGE = golden_cases.load("d3pm_images").config
_TEXT = golden_cases.load("d3pm_text").config
_PIXELS = 255.0  # the image code's largest value, whatever K


def _image_objective(combo):
  bands = combo["transition_bands"]
  transition = {
    "uniform": Band(bands=bands, normalise="vocabulary")
    if bands
    else Uniform(),
    "gaussian": Gaussian(span=_PIXELS, bands=bands),
    "absorbing": Absorbing(),
  }[combo["transition_mat_type"]]
  schedule = {
    "linear": LinearBeta(**_IMAGE["linear"]),
    "cosine": CosineBeta(),
    "jsd": MutualInformation(),
  }[combo["betas"]]
  return D3PM(
    vocab_size=_IMAGE["K"],
    mask_id=_IMAGE["K"] // 2 if transition.masks else None,
    transition=transition,
    schedule=schedule,
    steps=_IMAGE["T"],
    cross_entropy=_IMAGE["hybrid_coeff"],
    final="network",
    support="vocabulary",
    epsilon=1e-6,
  )


def _matrices(objective):
  """Returns step and product matrices, `[T + 1, K, K]`, rows from-state."""
  tables, kind = (
    objective.init(jax.random.key(0)).constants,
    objective.transition,
  )
  if not kind.closed:
    return tables["step"], tables["cumulative"]
  size, mask = objective.vocab_size, objective.mask_id
  n = np.arange(objective.steps + 1)[:, None]
  states = np.tile(np.arange(size), (len(n), 1))

  def run(tables):
    log_p = jnp.log(jnp.tile(jnp.eye(size), (len(n), 1, 1)))
    step = kind.neighbour(tables, states, n, size, mask)
    return jnp.swapaxes(step, 1, 2), kind.marginal(tables, log_p, n, mask)

  return recorded.told(run, tables)


def _log_softmax(logits):
  logits = np.asarray(logits, np.float64)
  return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def image():
  return golden_cases.load("d3pm_images").arrays


@pytest.fixture(scope="module")
def text():
  return golden_cases.load("d3pm_text").arrays


def test_image_betas(image):
  steps = _IMAGE["T"]
  for name, schedule in (
    ("linear", LinearBeta(**_IMAGE["linear"])),
    ("cosine", CosineBeta()),
    ("jsd", MutualInformation()),
  ):
    np.testing.assert_allclose(
      schedule.betas(steps), image[f"betas_{name}"], rtol=1e-5
    )


def _shows(i):
  """Returns what of the image code a combination shows."""
  combo = _IMAGE["combos"][i]
  return {combo["transition_mat_type"], combo["betas"]}


@pytest.mark.parametrize("i", quick.few(range(len(_IMAGE["combos"])), _shows))
@pytest.mark.few(1)
def test_image_process(image, i):
  combo = _IMAGE["combos"][i]
  objective, name = _image_objective(combo), combo["name"]
  process = objective.init(jax.random.key(0))
  step, product = _matrices(objective)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  close(step[1:], image[f"{name}_onestep"])
  close(product[1:], image[f"{name}_cum"])

  rows = len(image["t"])
  flat = lambda x: x.reshape(rows, -1, *x.shape[4:])
  n = image["t"][:, None] + 1  # its z_0 has had one step

  def run(process, x0, z, logits, uniforms, n):
    t, s = n / objective.steps, (n - 1) / objective.steps
    log_p = jnp.log(jax.nn.one_hot(x0, objective.vocab_size))
    kind, mask_id = objective.transition, objective.mask_id
    noise = Recorded(uniforms={Tag.TOKEN: uniforms})
    out = ModelOutputs(hidden=logits)
    prior = process.constants["prior_loss"]
    return (
      kind.marginal(process.constants, log_p, n, mask_id),
      objective.token_terms(process, logits, x0, z, t),
      prior[x0] if prior.ndim else jnp.broadcast_to(prior, x0.shape),
      objective.posterior(process, jnp.maximum(log_p, -1e9), z, t, s),
      objective.posterior(process, logits, z, t, s),
      objective.reverse(process, noise, out, z, t, s),
    )

  q, (term, clean), prior, truth, log_q, drawn = recorded.told(
    run,
    process,
    *(flat(image["x_start"]), flat(image[f"{name}_x_t"])),
    *(flat(image["model_logits"]), flat(image["noise"]), n),
  )
  close(q, flat(image[f"{name}_q_probs"]))
  bits = lambda x: np.mean(x, axis=1) / np.log(2)
  losses = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
  losses(bits(term), image[f"{name}_vb_bpd"])
  losses(bits(clean), image[f"{name}_ce_bpd"])
  hybrid = term + objective.cross_entropy * clean
  losses(bits(hybrid), image[f"{name}_hybrid"])
  losses(bits(prior), image[f"{name}_prior_bpd"])

  later = n[:, 0] > 1  # the first step has its own formula
  np.testing.assert_allclose(
    truth[later],
    _log_softmax(flat(image[f"{name}_posterior_logits_x0"]))[later],
    rtol=1e-4,
    atol=1e-4,
  )
  p_logits = flat(image[f"{name}_p_logits"])
  np.testing.assert_allclose(
    log_q, _log_softmax(p_logits), rtol=1e-4, atol=1e-4
  )
  last = n[:, 0] == 1  # the original adds no noise to its last step
  found = np.where(last[:, None], np.argmax(log_q, -1), drawn)
  np.testing.assert_array_equal(found, flat(image[f"{name}_p_sample"]))


def _text_objective(kind):
  transition, _, schedule = kind.rpartition("_")
  size, steps = _TEXT["dim"], _TEXT["num_steps"]
  low, high = _TEXT["linear"]["beta_min"], _TEXT["linear"]["beta_max"]
  transition = {
    "beta_diagonal": Uniform(),
    "mask": Absorbing(),
    "band_diagonal": Band(bands=_TEXT["band_width"] // 2),
    "gaussian": Gaussian(span=size),
  }[transition]
  return D3PM(
    vocab_size=size,
    mask_id=size - 1 if transition.masks else None,
    transition=transition,
    schedule={
      "standard": MutualInformation(),
      # The text code's last step stops one short of beta_max.
      "linear": LinearBeta(start=low, stop=high - (high - low) / steps),
      "cosine": CosineBeta(),
    }[schedule],
    steps=steps,
    cross_entropy=_TEXT["hybrid_lambda"],
    final="posterior",
    support="vocabulary",
    epsilon=1e-20,
  )


@pytest.mark.parametrize(
  "kind", quick.few(_TEXT["kinds"], lambda kind: {*kind.rpartition("_")})
)
@pytest.mark.few(2)
def test_text_process(text, kind):
  objective = _text_objective(kind)
  process, size = objective.init(jax.random.key(0)), objective.vocab_size
  np.testing.assert_allclose(
    objective.schedule.betas(objective.steps),
    text["beta_" + kind.rpartition("_")[2]],
    rtol=1e-5,
  )
  step, product = _matrices(objective)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
  turned = lambda x: np.swapaxes(x, 1, 2)  # its columns are our rows
  close(step[1:], turned(text[f"{kind}_get"]))
  # At t = T the original puts the stationary law in place of the product.
  close(product[:-1], turned(text[f"{kind}_product"])[: objective.steps])

  count = len(text["t"])
  each = lambda x: np.tile(x, (count,) + (1,) * x.ndim)
  x0, logits = each(text["x_start"]), each(text["model_logits"])
  s = np.float32(text["t"][:, None] / objective.steps)
  t = np.float32(s + 1 / objective.steps)

  def run(process, logits, x0, z, t, s):
    truth = jnp.log(jax.nn.one_hot(x0, size))
    # The law of every step given the clean text, but for the last (as above).
    steps = jnp.arange(objective.steps)[:, None]
    clean_text = jnp.tile(truth[:1], (objective.steps, 1, 1))
    return (
      objective.token_terms(process, logits, x0, z, t),
      objective.posterior(process, jnp.maximum(truth, -1e9), z, t, s),
      objective.posterior(process, logits, z, t, s),
      objective.transition.marginal(
        process.constants, clean_text, steps, objective.mask_id
      ),
    )

  z = text[f"{kind}_x_t_plus_1"]
  (term, clean), back, said, q = recorded.told(
    run, process, logits, x0, z, t, s
  )
  summed = lambda x: np.sum(x * text["target_mask"], axis=1)
  laws = {"q_t": np.exp(back), "p_t": np.exp(said)}
  # How likely one step back is the clean text.
  said = -np.take_along_axis(said, x0[..., None], axis=-1)[..., 0]
  sure = np.max(said, axis=1) < 20.0  # below that their 1e-20 shows
  later = text["t"] > 0
  for form in ("prob", "log"):
    get = lambda x: text[f"{kind}_{form}_{x}"]
    np.testing.assert_allclose(
      summed(term), get("base_loss"), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
      objective.cross_entropy * summed(clean),
      get("hybrid_loss"),
      rtol=1e-4,
      atol=1e-5,
    )
    np.testing.assert_allclose(
      summed(said)[sure],
      get("cross_entropy_loss")[sure],
      rtol=1e-4,
      atol=1e-5,
    )
    np.testing.assert_allclose(
      summed(term)[later], get("kl_loss")[later], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
      summed(term + objective.cross_entropy * clean),
      get("loss"),
      rtol=1e-4,
      atol=1e-5,
    )
  close(q, text[f"{kind}_qt"][: objective.steps])
  for name, p in laws.items():
    np.testing.assert_allclose(
      p, text[f"{kind}_prob_{name}"], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(
      p,
      np.exp(_log_softmax(text[f"{kind}_log_{name}"])),
      rtol=1e-4,
      atol=1e-6,
    )
  if f"{kind}_prior_kl" in text and not objective.transition.closed:
    prior = np.asarray(process.constants["prior_loss"])[text["x_start"]]
    total = np.sum(np.asarray(prior) * text["target_mask"])
    np.testing.assert_allclose(
      total, text[f"{kind}_prior_kl"], rtol=1e-4, atol=1e-6
    )

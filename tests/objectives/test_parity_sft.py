"""Fine-tuning losses against arrays of LLaDA's, d1's, dLLM's and dLLM-RL's code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.types import Batch, Process
from dllm_jax.objectives.base import Drawn
from dllm_jax.objectives.dream import Annealed, Dream
from dllm_jax.objectives.llada import Cut, LLaDA
from tests import golden_cases
from tests.quick import long
from tests.sampling import published


@pytest.fixture(scope="module")
def sft():
  return golden_cases.load("sft")


def _objective(case, cls=LLaDA, **fields):
  return cls(
    vocab_size=case.config["hf_config"]["vocab_size"],
    mask_id=case.config["mask_token_id"],
    random_length=0.0,
    **fields,
  )


def _batch(tokens, counts):
  ones = np.ones_like(tokens)
  slots = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  return Batch(
    tokens=jnp.asarray(tokens),
    loss_mask=jnp.asarray(counts),
    segment_ids=jnp.asarray(ones),
    positions=jnp.asarray(slots, jnp.int32),
  )


def _loss(objective, t, z, batch):
  """Returns (loss, gradient) of the recorded network; loss = total / weight."""
  model = published.model("sft")
  drawn = {LLaDA: Cut, Dream: Annealed}.get(type(objective), Drawn)(t=t, z=z)

  @jax.jit
  def run(params):
    def value(params):
      denoise = lambda inputs: model.denoiser.apply(params, inputs, None)[0]
      loss = objective.loss(Process(), denoise, drawn, batch, step=jnp.int32(0))
      return loss.total / loss.weight, loss

    return jax.value_and_grad(value, has_aux=True)(params)

  (value, loss), gradient = run(model.params)
  return value, gradient, loss


def _same_gradient(case, name, gradient, rtol=1e-5):
  found = {
    "grad_ln_f": gradient["final_norm"]["scale"],
    "grad_q_proj_0": gradient["layers"]["attention"]["q"]["kernel"][0],
  }
  for key, value in found.items():
    want = case.arrays[f"{name}_{key}"]
    if want.ndim == 2:
      value = np.asarray(value).reshape(want.shape[1], -1).T
    np.testing.assert_allclose(
      value, want, rtol=0, atol=rtol * np.abs(want).max()
    )


def _answers(case):
  """Returns a batch whose rows are filled, the fill counted, as in LLaDA."""
  tokens, given = case.arrays["input_ids"], case.arrays["prompt_lengths"]
  return _batch(tokens, np.arange(tokens.shape[1]) >= given[:, None])


@pytest.mark.all
def test_llada_divides_each_answer_by_its_length(sft):
  a = sft.arrays
  value, gradient, loss = _loss(
    _objective(sft, normalisation="sequence"),
    a["guideline_p_mask"][:, None],
    a["guideline_noised"],
    _answers(sft),
  )
  np.testing.assert_allclose(value, a["guideline_loss"], rtol=1e-5)
  np.testing.assert_allclose(
    loss.bound, a["guideline_token_loss"], rtol=1e-4, atol=1e-5
  )
  _same_gradient(sft, "guideline", gradient)


def test_d1_takes_one_mean_of_the_batch(sft):
  a = sft.arrays
  value, gradient, _ = _loss(
    _objective(sft, normalisation="token"),
    a["d1_t"][:, None],
    a["d1_noised"],
    _answers(sft),
  )
  np.testing.assert_allclose(value, a["d1_loss"], rtol=1e-5)
  _same_gradient(sft, "d1", gradient)


_RULES = {
  "token": {},
  "sequence": {"normalisation": "sequence"},
  "batch": {"normalisation": "batch"},
  "token_uniform": {"weighting": "uniform"},
}


@pytest.mark.parametrize("rule", _RULES)
@pytest.mark.few(1)
def test_dllm(sft, rule):
  a = sft.arrays
  tokens, labels = a["dllm_input_ids"], a["dllm_labels"]
  batch = _batch(tokens, labels != -100)
  low = sft.config["dllm_time_epsilon"]
  t = low + (1 - low) * a["dllm_u_t"][:, None]
  value, gradient, _ = _loss(
    _objective(sft, **_RULES[rule]), t, a["dllm_noised"], batch
  )
  answers = (labels != -100).any(axis=1)
  if rule in ("sequence", "batch"):  # A row without an answer is a row there.
    value *= answers.mean()
  np.testing.assert_allclose(value, a[f"dllm_{rule}_loss"], rtol=1e-5)
  if rule == "token":
    _same_gradient(sft, "dllm_token", gradient)


@pytest.mark.all
def test_dream_weighs_by_context(sft):
  a = sft.arrays
  objective = _objective(
    sft,
    Dream,
    cart_decay=sft.config["dream_cart_geo_p"],
    normalisation="token",
  )
  labels = a["dllm_labels"]
  z, batch = a["dllm_noised"], _batch(a["dllm_input_ids"], labels != -100)
  weights = objective.emphasis(Process(), z, None, batch)
  masked = z != a["dllm_input_ids"]
  np.testing.assert_allclose(
    np.where(masked, weights, 0),
    np.where(masked, a["dream_cart_weights"], 0),
    rtol=1e-5,
    atol=1e-7,
  )
  t = np.ones((len(z), 1), np.float32)
  value, _, _ = _loss(objective, t, z, batch)
  np.testing.assert_allclose(value, a["dream_token_cart_loss"], rtol=1e-5)


@pytest.mark.parametrize("way", ["random_masking", long("semi_ar")])
def test_dllm_rl_averages_masked_tokens_of_each_row(sft, way):
  a = sft.arrays
  z, labels = a[f"rl_{way}_noised"], a[f"rl_{way}_labels"]
  counts = a[f"rl_{way}_p_mask"] & (labels != -100)
  # What is masked and does not count (padding) lies outside of the loss mask.
  batch = _batch(np.where(labels == -100, 0, labels), counts)
  objective = _objective(
    sft, weighting="uniform", normalisation="masked_sequence"
  )
  t = np.ones((len(z), 1), np.float32)
  value, _, _ = _loss(objective, t, z, batch)
  np.testing.assert_allclose(value, a[f"rl_{way}_loss"], rtol=1e-5)


def test_times_between_limits(sft):
  limits = sft.config["rl"]
  low, high = limits["lower_p"], limits["upper_p"]
  objective = _objective(sft, time_epsilon=low, time_limit=high)
  t = objective.time(jax.random.key(0), (512, 1))
  assert low <= t.min() < low + 0.02
  assert high - 0.02 < t.max() <= high

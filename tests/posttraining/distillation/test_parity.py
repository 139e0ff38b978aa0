"""Distillation losses against arrays of dParallel's, d3LLM's and Duo's code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.types import ModelOutputs, Process
from dllm_jax.objectives.llada import LLaDA
from dllm_jax.objectives.udlm import UDLM
from dllm_jax.posttraining.distillation import (
  certainty,
  D3LLM,
  DCD,
  dcd,
  DParallel,
)
from tests import golden_cases
from tests.sampling import published


@pytest.fixture(scope="module")
def case():
  return golden_cases.load("distill_dparallel")


@pytest.fixture(scope="module")
def duo():
  return golden_cases.load("distill_dcd")


def _batch(tokens, given, **leaves):
  slots = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
  return certainty.Answers(
    tokens=jnp.asarray(tokens),
    loss_mask=jnp.asarray(slots >= given[:, None]),
    segment_ids=jnp.ones_like(tokens),
    positions=jnp.asarray(slots, jnp.int32),
    **leaves,
  )


def _loss(case, method, masks, batch):
  """Returns (loss, gradient) of the recorded network."""
  model = published.model("distill_dparallel")
  objective = LLaDA(
    vocab_size=case.config["hf_config"]["vocab_size"],
    mask_id=case.config["mask_token_id"],
  )

  @jax.jit
  def run(params, masks):
    def value(params):
      denoise = lambda inputs: model.denoiser.apply(params, inputs, None)[0]
      loss = method.loss(objective, Process(), denoise, masks, batch)
      return loss.total / jnp.maximum(loss.weight, 1.0)

    return jax.value_and_grad(value)(params)

  return run(model.params, masks)


def _same_gradient(case, name, gradient):
  found = {
    "grad_ln_f": gradient["final_norm"]["scale"],
    "grad_q_proj_0": gradient["layers"]["attention"]["q"]["kernel"][0],
  }
  for key, value in found.items():
    want = case.arrays[f"{name}_{key}"]
    if want.ndim == 2:
      value = np.asarray(value).reshape(want.shape[1], -1).T
    scale = np.abs(want).max()
    np.testing.assert_allclose(value, want, rtol=0, atol=1e-5 * scale)


def _scattered(where, u, shape):
  """Returns uniforms at the slots that they were drawn for, 1 elsewhere."""
  full = np.ones(shape, np.float32)
  full[np.asarray(where)] = np.concatenate([np.ravel(row) for row in u])
  return full


def _masks(case, name, where, batch, u):
  hidden = u < certainty.certain(0.5)
  masks = certainty.hide(batch, where, hidden, case.config["mask_token_id"])
  a = case.arrays
  for i, way in enumerate(("", "_rev")):
    np.testing.assert_array_equal(masks.z[:, i], a[f"{name}_noised{way}"])
    np.testing.assert_array_equal(masks.masked[:, i], a[f"{name}_masked{way}"])
  return masks


@pytest.mark.parametrize("name", ["dparallel0", "dparallel1", "dparallel2"])
@pytest.mark.all
def test_dparallel(case, name):
  a, method = case.arrays, DParallel(**case.config["dparallel"])
  batch = _batch(a[f"{name}_input_ids"], a[f"{name}_prompt_lengths"])
  number = certainty.blocks_of(certainty.counted(batch), method.block_size)
  where = certainty.region(
    batch, a[f"{name}_block"], method.block_size, last=number - 1
  )
  u = [a[f"{name}_uniform_0"][0]]
  u = _scattered(where.inside, u, batch.tokens.shape)
  masks = _masks(case, name, where, batch, u)
  value, gradient = _loss(case, method, masks, batch)
  np.testing.assert_allclose(value, a[f"{name}_loss"], rtol=1e-5)
  if f"{name}_grad_ln_f" in a:
    _same_gradient(case, name, gradient)


@pytest.mark.all
def test_dparallel_of_a_batch_as_the_original_has_it(case):
  """Each row's part is hidden in all rows, and only the last row has a tail."""
  a, name = case.arrays, "dparallel_batch"
  tokens, given = a[f"{name}_input_ids"], a[f"{name}_prompt_lengths"]
  size = case.config["dparallel"]["block_size"]
  batch = _batch(tokens, np.zeros_like(given))
  first = np.zeros((3, *tokens.shape), bool)
  second, tail = first.copy(), np.zeros(tokens.shape, bool)
  for row in range(len(tokens)):
    begin = given[row] + a[f"{name}_block"][row] * size
    u = a[f"{name}_uniform_{row}"]
    part = slice(begin, begin + u.shape[1])
    first[row, :, part] = u < certainty.certain(0.5)
    second[row, :, part] = ~first[row, :, part]
    if row == len(tokens) - 1:
      tail[row, part.stop :] = True
  masked = np.stack([first.any(0), second.any(0)], axis=1)
  np.testing.assert_array_equal(masked[:, 0], a[f"{name}_masked"])
  np.testing.assert_array_equal(masked[:, 1], a[f"{name}_masked_rev"])
  z = np.stack([a[f"{name}_noised"], a[f"{name}_noised_rev"]], axis=1)
  mask_id = case.config["mask_token_id"]
  np.testing.assert_array_equal(z == mask_id, masked | tail[:, None])
  fields = case.config["dparallel"] | {"block_size": tokens.shape[1]}
  method = DParallel(**fields, normalisation="masked")
  masks = certainty.Masks(z=jnp.asarray(z), masked=jnp.asarray(masked))
  value, gradient = _loss(case, method, masks, batch)
  np.testing.assert_allclose(value, a[f"{name}_loss"], rtol=1e-5)
  if f"{name}_grad_ln_f" in a:
    _same_gradient(case, name, gradient)


def _before(case, given):
  """Returns how many slots stood when each was revealed, of a trajectory."""
  canvases, lengths = (
    case.arrays[f"d3llm_trajectory{way}"] for way in ("", "_length")
  )
  mask_id = case.config["mask_token_id"]
  before = np.zeros(canvases[:, 0].shape, np.int32)
  for row, (canvas, length) in enumerate(zip(canvases, lengths, strict=True)):
    masked = canvas[:length] == mask_id
    stood = (~masked[:, given[row] :]).sum(axis=1)
    last = masked.cumprod(axis=0).sum(axis=0) - 1
    before[row] = np.where(last >= 0, stood[last], -1)
    # Some are never revealed: what is not there is not hidden either.
    before[row][masked[-1]] = stood[-1]
  return before


@pytest.mark.parametrize("name", ["d3llm", "d3llm_plain", "d3llm_random"])
@pytest.mark.all
def test_d3llm(case, name):
  a, config = case.arrays, case.config["d3llm"]
  given = a["d3llm_prompt_lengths"]
  batch = _batch(
    a["d3llm_input_ids"],
    given,
    length=jnp.asarray(a["d3llm_full_lengths"] - given),
    before=jnp.asarray(_before(case, given)),
  )
  method = D3LLM(
    block_sizes=config["progressive_block_sizes"],
    passes=config["num_train_epochs"],
    min_mask_ratio=config["min_mask_ratio"],
    max_mask_ratio=config["max_mask_ratio"],
    temperature=config["temperature"],
    entropy_weight=config["entropy_weight"],
    normalisation="masked",
    complement=name != "d3llm_plain",
  )
  part = config["epoch"] / config["num_train_epochs"]
  size = method.block_size(jnp.float32(part))
  assert int(size) == a[f"{name}_block_size"]
  progress = config["global_step"] / config["max_steps"]
  ratio = a[f"{name}_mask_ratio"]
  assert method.least_ratio(progress) <= ratio <= method.max_mask_ratio
  block, ratios = jnp.asarray(a[f"{name}_block"]), jnp.full(len(given), ratio)
  number = certainty.blocks_of(batch.length, size)
  where = certainty.region(batch, block, size, last=number - 1)
  if name == "d3llm_random":
    u = [a[f"{name}_uniform_{row}"] for row in range(len(given))]
    u = _scattered(where.inside, u, batch.tokens.shape)
    hidden = u < certainty.certain(ratios)[:, None]
  else:
    hidden = method.unrevealed(batch, block, size, where, ratios)
  mask_id = case.config["mask_token_id"]
  masks = certainty.hide(
    batch, where, hidden, mask_id, complement=method.complement
  )
  for i, way in enumerate(("", "_rev")[: masks.z.shape[1]]):
    np.testing.assert_array_equal(masks.z[:, i], a[f"{name}_noised{way}"])
    np.testing.assert_array_equal(masks.masked[:, i], a[f"{name}_masked{way}"])
  value, gradient = _loss(case, method, masks, batch)
  np.testing.assert_allclose(value, a[f"{name}_loss"], rtol=1e-5)
  if f"{name}_grad_ln_f" in a:
    _same_gradient(case, name, gradient)


def _dcd(duo, kind="reverse"):
  config = duo.config
  return DCD(
    steps=config["T"],
    round_steps=config["update_teacher_every"],
    gamma_min=config["gamma_min"],
    gamma_max=config["gamma_max"],
    divergence=kind,
  )


def _path(duo, method):
  a, config = duo.arrays, duo.config
  x0, noise = a["x0"], a["epsilon"]
  own = np.take_along_axis(noise, x0[..., None], axis=-1)[..., 0]
  others = np.where(np.arange(noise.shape[-1]) == x0[..., None], -9, noise)
  latents = dcd.Latents(own, others.max(axis=-1), others.argmax(axis=-1))
  n, low = len(x0), config["sampling_eps"]
  t = (1 - low) * ((a["u_t"] / n + np.arange(n) / n) % 1) + low
  times = method.times(jnp.asarray(t)[:, None], config["global_step"])
  return method.path(latents, jnp.asarray(x0), times)


def test_paths_of_duo(duo):
  a, method = duo.arrays, _dcd(duo)
  path = _path(duo, method)
  np.testing.assert_array_equal(path.z_t, a["xt"])
  np.testing.assert_array_equal(path.z_s, a["xs"])
  for step, want in zip(a["dt_schedule_steps"], a["dt_schedule"], strict=True):
    assert method.delta(step) == want


@pytest.mark.all
def test_the_integral_of_duo(duo):
  """Ours to rounding; the original's own sum has a coarse grid."""
  a, vocab = duo.arrays, duo.config["vocab_size"]
  grid = a["integral_gamma"]
  kept = dcd.kept_probability(jnp.asarray(grid), vocab)
  np.testing.assert_allclose(kept, a["integral_pt"], rtol=2e-4)
  method = _dcd(duo)
  path = _path(duo, method)
  for t, name in ((path.t, "sigma_t"), (path.s, "sigma_s")):
    nearest = np.abs(method.gamma(t) - grid).argmin(axis=-1)
    alpha = dcd.alpha_of(a["integral_pt"][nearest], vocab)
    np.testing.assert_allclose(-np.log(alpha), a[name][:, 0], rtol=2e-3)
    ours = method.sigma(t, vocab)[:, 0]
    np.testing.assert_allclose(ours, a[name][:, 0], rtol=0.02, atol=2e-5)


@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_consistency_losses_of_duo(duo, kind):
  a, method = duo.arrays, _dcd(duo, kind)
  name = {"forward": "kl_fwd", "reverse": "kl_bwd"}[kind]
  objective = UDLM(vocab_size=duo.config["vocab_size"])
  batch = _batch(a["x0"], np.zeros(len(a["x0"]), int))
  teacher = lambda inputs: ModelOutputs(
    hidden=jnp.asarray(a["teacher_log_x_theta"])
  )

  def value(logits):
    student = lambda inputs: ModelOutputs(hidden=logits)
    terms = method.terms(
      objective, Process(), student, teacher, _path(duo, method), batch
    )
    return jnp.mean(terms), terms

  logits = jnp.asarray(a["student_log_x_theta"])
  gradient, terms = jax.grad(value, has_aux=True)(logits)
  np.testing.assert_allclose(terms, a[f"{name}_loss"], rtol=1e-5, atol=1e-6)
  # Ours is of logits: the original's less its share of each distribution.
  want = a[f"{name}_grad_student"]
  p = np.exp(a["student_log_x_theta"])
  want = want - p * want.sum(axis=-1, keepdims=True)
  scale = np.abs(want).max()
  np.testing.assert_allclose(gradient, want, rtol=0, atol=1e-5 * scale)

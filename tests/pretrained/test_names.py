"""Published DiT weights go in, the originals' logits come out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.mask import BlockCausal, Full, TwoStream
from dllm_jax.core.types import ModelInputs
from dllm_jax.models import dit
from dllm_jax.pretrained import DIT, to_ours, to_theirs
from tests import golden_cases
from tests.pretrained.golden import dit_config

# Stated with the recorded arrays: the originals' own float64 to float32 error is
# 3e-6 on logits, and 2e-4 covers another order of float32 sums.
TOLERANCE = 2e-4


@functools.cache
def loaded(name):
  case = golden_cases.load(name)
  config = dit_config(case)
  params = to_ours(DIT, golden_cases.weights(name), config).params
  params = jax.tree.map(jnp.asarray, params)
  apply = jax.jit(dit(config).apply)

  def logits(tokens, sigma=None, cond=None, mask=Full(), cache=None, **fields):
    tokens = jnp.asarray(tokens)
    length = mask.length if isinstance(mask, TwoStream) else tokens.shape[1]
    positions = jnp.arange(tokens.shape[1]) % length
    inputs = ModelInputs(**{
      "latent": tokens,
      "positions": jnp.broadcast_to(positions, tokens.shape),
      "segment_ids": jnp.ones_like(tokens),
      "conditioning": None if sigma is None else jnp.asarray(sigma)[:, None],
      "cond": None if cond is None else jnp.asarray(cond),
      "mask": mask,
      **fields,
    })
    out, cache = apply(params, inputs, cache)
    values = out.hidden @ out.unembed + out.bias
    return values[..., : out.vocab_size], cache

  return case, config, logits


def close(ours, theirs):
  np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.all
def test_mdlm():
  case, _, logits = loaded("mdlm")
  a = case.arrays
  close(logits(a["xt"])[0], a["logits_sigma0"])
  close(logits(a["xt"], 0 * a["sigma"])[0], a["logits_sigma0"])
  close(logits(a["xt"], a["sigma"])[0], a["logits_sigma"])


@pytest.mark.parametrize("name", ["sedd_absorb", "sedd_uniform"])
@pytest.mark.all
def test_sedd(name):
  case, config, logits = loaded(name)
  a = case.arrays
  score = np.array(logits(a["x"], a["sigma"])[0])
  if case.config["config"]["model"]["scale_by_sigma"]:
    scale = np.log(np.expm1(a["sigma"])) + np.log(config.vocab_size - 1)
    score = score - scale[:, None, None]
  np.put_along_axis(score, a["x"][:, :, None], 0.0, axis=-1)
  close(score, a["log_score"])


@pytest.mark.all
def test_bd3lm_two_streams():
  case, _, logits = loaded("bd3lm")
  a = case.arrays
  length, block = a["x0"].shape[1], case.config["config"]["block_size"]
  tokens = np.concatenate([a["xt"], a["x0"]], axis=1)
  for size, name in (
      (block, "logits"), (length // 2, "logits_block_half"), (1, "logits_block_1")
  ):  # fmt: skip
    out = logits(tokens, mask=TwoStream(length, size))[0]
    close(out[:, :length], a[name])
  out = logits(tokens, a["sigma"], mask=TwoStream(length, block))[0]
  close(out[:, :length], a["logits_sigma"])


def subs(logits, tokens, mask):
  logits = np.array(logits)
  logits[..., mask] = -np.inf
  log_p = jax.nn.log_softmax(logits)
  return np.where((tokens == mask)[..., None], log_p, 0.0)


@pytest.mark.all
def test_bd3lm_sampling_with_and_without_a_cache():
  case, config, logits = loaded("bd3lm")
  a, mask_id = case.arrays, case.config["mask_index"]
  tokens, block = a["sample_x"], case.config["config"]["block_size"]
  rows, length = tokens.shape
  start = np.flatnonzero((tokens == mask_id).any(0))[0] // block * block
  spec = BlockCausal(block)
  end = start + block

  def check(ours, name, at):
    here = tokens[:, at : at + ours.shape[1]]
    theirs = a[name][:, -ours.shape[1] :]
    masked = (here == mask_id)[..., None] & (
      np.arange(config.vocab_size) != mask_id
    )
    close(
      np.where(masked, subs(ours, here, mask_id), 0),
      np.where(masked, theirs, 0),
    )

  check(logits(tokens, mask=spec)[0], "sample_logprobs_uncached", 0)
  _, cache = logits(
    tokens[:, :start], mask=spec, cache=config.cache(rows, length)
  )
  cached, _ = logits(
    tokens[:, start:end],
    mask=spec,
    cache=cache,
    slot=jnp.full((rows,), start),
    positions=jnp.broadcast_to(jnp.arange(start, end), (rows, block)),
  )
  check(cached, "sample_logprobs_cached", start)


@pytest.mark.all
def test_udlm():
  case, config, logits = loaded("udlm")
  a = case.arrays
  null = np.full_like(a["cond"], config.num_classes)
  for cond, name in (
    (None, "log_x_theta"),
    (a["cond"], "log_x_theta_cond"),
    (null, "log_x_theta_nullcond"),
  ):
    ours = jax.nn.log_softmax(logits(a["xt"], a["sigma"], cond)[0])
    # The tolerance stated for these is relative: 1e-4.
    np.testing.assert_allclose(ours, a[name], rtol=1e-4, atol=1e-5)


def test_udlm_round_trip_is_byte_equal():
  case = golden_cases.load("udlm")
  config, theirs = dit_config(case), golden_cases.weights("udlm")
  there = to_ours(DIT, theirs, config)
  prefix = there.source.prefix
  assert set(there.used) | set(there.unused) == set(theirs)
  assert there.unused == (prefix + "rotary_emb.inv_freq",)
  back = to_theirs(DIT, there.params, config, source=there.source)
  assert set(back) == set(theirs)
  for key, tensor in theirs.items():
    made = back[key].make()
    assert made.dtype == tensor.dtype and made.shape == tensor.shape
    assert made.tobytes() == tensor.tobytes(), key

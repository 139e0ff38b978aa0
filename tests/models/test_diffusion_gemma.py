"""DiffusionGemma's network: how a canvas reads what was kept of the text."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.mask import Causal, Full
from dllm_jax.core.types import ModelInputs
from dllm_jax.models import layers
from dllm_jax.models.attention import kept
from dllm_jax.models.diffusion_gemma.config import GemmaConfig
from dllm_jax.models.diffusion_gemma.network import gemma

CANVAS, SLOTS, STARTS = 8, 48, np.array([40, 21])


def config(**fields) -> GemmaConfig:
  """Windowed layers keep 19 places, fewer than the text of either row."""
  return GemmaConfig(
    vocab_size=64, width=32, layers=3, heads=2, kv_heads=1, head_dim=16,
    full_kv_heads=2, full_head_dim=32, window=20, experts=2, **fields,
  )  # fmt: skip


def inputs(rows, length, mask, first, real=None):
  at = first[:, None] + np.arange(length)
  ids = np.random.default_rng(length).integers(0, 64, (rows, length))
  real = np.ones((rows, length)) if real is None else real
  return ModelInputs(
    latent=jnp.asarray(ids),
    positions=jnp.asarray(at),
    segment_ids=jnp.asarray(real, jnp.int32),
    mask=mask,
    slot=jnp.asarray(first),
  )


@functools.cache
def parameters():
  text = inputs(2, 4, Full(), np.zeros(2, int))
  params = gemma(config()).init(jax.random.key(0), text)
  draw = lambda x: 0.3 * np.random.default_rng(x.size).normal(size=x.shape)
  return jax.tree.map(lambda x: jnp.asarray(draw(x), x.dtype), params)


def hidden(attention, params):
  """Returns a canvas's states behind texts of different lengths."""
  shape = config(attention=attention)
  run = gemma(shape).apply
  real = np.arange(STARTS.max()) < STARTS[:, None]
  text = inputs(2, STARTS.max(), Causal(), np.zeros(2, int), real)
  canvas = inputs(2, CANVAS, Full(), STARTS)

  def both(params):
    cache = run(params, text, shape.cache(2, SLOTS))[1]
    return run(params, canvas, cache)[0].hidden

  return jax.jit(both)(params)


@pytest.mark.parametrize("part", [lambda x: x, layers.apart])
def test_the_kernel_reads_the_cache_as_the_reference_does(monkeypatch, part):
  calls, run = [], functools.partial(kept.attention, interpret=True)

  def counted(*args, **options):
    calls.append(args)
    return run(*args, **options)

  monkeypatch.setattr(kept, "chosen", lambda name: name == "flash")
  monkeypatch.setattr(kept, "attention", counted)
  found = hidden("flash", part(parameters()))
  assert calls
  np.testing.assert_allclose(found, hidden(None, parameters()), atol=2e-5)


def test_what_is_trained_through_has_no_kernel(monkeypatch):
  """The kernel has no gradient: a canvas whose text comes beside it needs one."""
  monkeypatch.setattr(kept, "chosen", lambda name: True)
  monkeypatch.setattr(kept, "attention", None)
  run = gemma(config(remat="full")).apply
  text = inputs(2, 20, Causal(), np.zeros(2, int)).replace(slot=None)
  canvas = inputs(2, CANVAS, Full(), np.full(2, 20))

  def loss(params):
    past = run(params, text, None)[0].past
    out, _ = run(params, canvas.replace(past=past), None)
    return jnp.sum(jnp.square(out.hidden))

  gradient = jax.jit(jax.grad(loss))(parameters())
  attention = gradient["period"]["run0"]["layers"]["attention"]
  assert all(bool(jnp.any(g)) for g in jax.tree.leaves(attention))

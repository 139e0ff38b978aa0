"""Diffusion-LM where its network is exact: samples follow the text's law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.types import ModelOutputs
from dllm_jax.objectives.diffusion_lm import DiffusionLM
from tests.objectives import toy

_VOCAB, _LENGTH, _ROWS, _STEPS = 3, 2, 8000, 200


@pytest.mark.all  # two hundred steps of thousands of rows
def test_samples_of_an_exact_network_follow_the_law_of_the_text():
  objective = DiffusionLM(
    vocab_size=_VOCAB, features=4, steps=_STEPS, clamp=False
  )
  process = objective.init(jax.random.key(0))
  embedding = 2.0 * jnp.eye(_VOCAB, 4)
  process = process.replace(
    params={"embedding": embedding, "bias": jnp.zeros(_VOCAB)}
  )
  rows = toy.states(_VOCAB, _LENGTH)
  weights = np.random.default_rng(3).gamma(0.5, size=len(rows))
  law = weights / weights.sum()
  means = embedding[rows]  # [texts, L, E]
  kept, lost = process.constants["kept"], process.constants["lost"]

  def exact(inputs):
    """Returns E[x_start | z]: every text is a bell around its embeddings."""
    n = jnp.round(inputs.conditioning * _STEPS / 1000.0).astype(jnp.int32) + 1
    k, spread = kept[n][:, 0, None, None], lost[n][:, 0, None, None]
    z, wide = inputs.latent, k * lost[1] + spread
    gap = z[:, None] - jnp.sqrt(k)[:, None] * means  # [B, texts, L, E]
    fit = -jnp.sum(gap**2, axis=(2, 3)) / (2.0 * wide[..., 0])
    p = jax.nn.softmax(fit + jnp.log(law))
    start = means + (lost[1] * jnp.sqrt(k) / wide)[:, None] * gap
    return ModelOutputs(hidden=jnp.einsum("bx,bxle->ble", p, start))

  data, times = toy.batch(np.zeros((_ROWS, _LENGTH))), objective.grid(_STEPS)

  @jax.jit
  def run():
    def body(z, now):
      step, t, s = now
      t, s = (jnp.full((_ROWS, 1), x) for x in (t, s))
      out = exact(objective.inputs(process, z, t, data))
      noise = toy.keyed(0, _ROWS, _LENGTH, step)
      return objective.reverse(process, noise, out, z, t, s), None

    z = objective.prior(toy.keyed(0, _ROWS, _LENGTH, _STEPS), (_ROWS, _LENGTH))
    steps = jnp.arange(_STEPS), times[:-1], times[1:]
    tokens = objective.decode(process, jax.lax.scan(body, z, steps)[0])
    return jnp.bincount(toy.index(tokens, _VOCAB), length=len(rows))

  # Two draws of 8000 rows differ by 0.02, steps of 1 / 200 by less.
  assert toy.variation(np.asarray(run()) / _ROWS, law) < 0.04

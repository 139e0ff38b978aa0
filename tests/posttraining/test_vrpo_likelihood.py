"""The estimator of log-likelihoods: what it reads, and that its mean is exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.schedule import Linear
from dllm_jax.core.types import Batch
from dllm_jax.objectives.autoregressive import Autoregressive
from dllm_jax.objectives.bd3lm import BD3LM
from dllm_jax.objectives.dream import Dream
from dllm_jax.objectives.llada import LLaDA
from dllm_jax.objectives.md4 import MD4
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.posttraining import likelihood
from tests import toys

_SPACE = {"vocab_size": 5, "mask_id": 4}
_OBJECTIVES = {
  "mdlm": MDLM(**_SPACE),
  "llada": LLaDA(**_SPACE),
  "dream": Dream(**_SPACE),
  "md4": MD4(**_SPACE, schedule=Linear(ceiling=0.999), time_conditioning=True),
  "bd3lm": BD3LM(**_SPACE, length=6, block_size=3),
}


def _batch(tokens, given=0):
  tokens = jnp.asarray(tokens, jnp.int32)
  slots = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  return Batch(
    tokens=tokens,
    loss_mask=slots >= given,
    segment_ids=jnp.ones_like(tokens),
    positions=slots,
  )


@pytest.mark.parametrize("name", _OBJECTIVES)
@pytest.mark.all
def test_reads_what_objectives_restore(name):
  objective = _OBJECTIVES[name]
  network = toys.mixer(5, 7)
  params = network.init(jax.random.key(1), None)
  denoise = lambda inputs: network.apply(params, inputs, None)[0]
  process = objective.unbiased(objective.init(jax.random.key(0)))
  batch = _batch(np.random.default_rng(0).integers(4, size=(2, 6)), given=2)
  keys = jax.random.split(jax.random.key(2), 2)

  @jax.jit
  def both(keys):
    masks = likelihood.draw_masks(objective, process, keys, batch, n_t=3)
    found = likelihood.log_terms(objective, process, denoise, masks, batch)
    flat = lambda x: x.reshape(-1, x.shape[-1])
    rows = jax.tree.map(lambda x: jnp.repeat(x, 3, axis=0), batch)
    rate = jnp.broadcast_to(flat(objective.masked(masks.t)), (6, 6))
    terms = objective.restore(process, denoise, flat(masks.z), rows, rate)
    return found, -masks.weight * terms.reshape(found.shape)

  found, want = both(keys)
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)
  assert (np.asarray(found) != 0).any(axis=-1).all()


@pytest.mark.parametrize("estimator", ["counts", "times"])
@pytest.mark.few(1)
def test_its_mean_is_the_log_likelihood(estimator):
  # Under the exact conditionals every order has the same product.
  sequences, p = toys.joint(3, tokens=4, length=3)
  network = toys.tabular(4, 3, mask_id=4)
  denoise = lambda inputs: network.apply(jnp.asarray(p), inputs, None)[0]
  objective, n = _OBJECTIVES["mdlm"], 4096
  process = objective.init(jax.random.key(0))
  rows = np.argsort(p)[-2:]
  batch = _batch(sequences[rows])

  @jax.jit
  def samples(keys):
    masks = likelihood.draw_masks(
      objective, process, keys, batch, n_t=n, estimator=estimator
    )
    terms = likelihood.log_terms(objective, process, denoise, masks, batch)
    return terms.sum(axis=-1)

  found = np.asarray(samples(jax.random.split(jax.random.key(0), 2)))
  error = found.std(axis=1) / np.sqrt(n)
  # From 1e-3 on, times miss a thousandth.
  assert (abs(found.mean(axis=1) - np.log(p[rows])) < 4 * error + 3e-3).all()


def test_what_has_no_masks_is_refused():
  with pytest.raises(ValueError, match="Autoregressive as configured is no"):
    likelihood.check_objective(Autoregressive(**_SPACE))
  with pytest.raises(ValueError, match="no masked diffusion"):
    likelihood.check_objective(MDLM(**_SPACE, steps=8))

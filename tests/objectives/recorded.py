"""Recorded arrays as batches, networks and noise, for parity tests."""

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax.core.noise import Recorded, Tag
from dllm_jax.core.types import Batch, ModelOutputs

STEP = jnp.int32(0)


def batch(x0, loss_mask=None):
  x0 = jnp.asarray(x0)
  ones = jnp.ones(x0.shape, bool)
  return Batch(
    tokens=x0,
    loss_mask=ones if loss_mask is None else jnp.asarray(loss_mask, bool),
    segment_ids=ones.astype(jnp.int32),
    positions=jnp.broadcast_to(jnp.arange(x0.shape[1]), x0.shape),
  )


def network(logits):
  """Returns a network that says the recorded logits."""
  return lambda inputs: ModelOutputs(hidden=jnp.asarray(logits))


def column(t):
  return jnp.asarray(t).reshape(-1, 1)


def with_mask_column(logits):
  """Returns logits with a last column for the mask."""
  return np.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, 1)])


def replay(monkeypatch, *draws):
  """Makes jax.random.uniform return recorded draws, in their order."""
  draws = list(draws)

  def uniform(key, shape=()):
    del key
    return jnp.asarray(draws.pop(0)).reshape(shape)

  monkeypatch.setattr(jax.random, "uniform", uniform)


def reverse_step(objective, process, logits, z, t, s, u):
  """Returns posterior probabilities of a step, and its replayed draw."""
  shape = jnp.asarray(logits).shape
  z, t, s = jnp.asarray(z), jnp.asarray(t), jnp.asarray(s)
  log_p = objective.posterior(process, jnp.asarray(logits), z, t, s)
  noise = Recorded(uniforms={int(Tag.TOKEN): jnp.asarray(u)}, epsilon=1e-10)
  out = ModelOutputs(hidden=jnp.asarray(logits))
  drawn = objective.reverse(process, noise, out, z, t, s)
  assert log_p.shape == shape
  return np.exp(np.asarray(log_p, np.float64)), np.asarray(drawn)


def ratios(p, u):
  return p / (1e-10 - np.log(u.astype(np.float64) + 1e-10))

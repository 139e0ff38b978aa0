"""Recorded arrays as batches, networks and noise, for parity tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax.core.noise import Recorded, Tag
from dllm_jax.core.types import ModelOutputs
from tests.objectives import toy

STEP = jnp.int32(0)


def batch(x0, loss_mask=None):
  if loss_mask is not None:
    loss_mask = jnp.asarray(np.asarray(loss_mask, bool))
  return toy.batch(x0, loss_mask=loss_mask)


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
  log_p, drawn = _step(objective)(process, logits, z, t, s, u)
  assert log_p.shape == logits.shape
  return np.exp(np.asarray(log_p, np.float64)), np.asarray(drawn)


@functools.lru_cache(maxsize=8)
def _step(objective):
  """Returns `(process, logits, z, t, s, u) -> (log p, draw)`, compiled once."""

  def run(process, logits, z, t, s, u):
    log_p = objective.posterior(process, logits, z, t, s)
    noise = Recorded(uniforms={int(Tag.TOKEN): u}, epsilon=1e-10)
    out = ModelOutputs(hidden=logits)
    return log_p, objective.reverse(process, noise, out, z, t, s)

  return jax.jit(run)


def told(run, *args):
  """Returns what a function says of arrays, compiled as one program."""
  return jax.device_get(jax.jit(run)(*args))


def ratios(p, u):
  return p / (1e-10 - np.log(u.astype(np.float64) + 1e-10))

"""Updates of each method against the gradient of expected reward, enumerated.

Three tokens, four slots, revealed one at a time in a random order: 81 answers by
24 orders, so that expected reward and its gradient are sums.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.types import ModelOutputs, Process
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.posttraining.reinforcement.methods import (
  CoupledGRPO,
  DiffuGRPO,
  ESPO,
  SPG,
  TraceRL,
  WD1,
)
from dllm_jax.posttraining.reinforcement.rollouts import Rollouts
from tests import quick

TOKENS, SLOTS, MASK = 3, 4, 3
ANSWERS = np.array(list(itertools.product(range(TOKENS), repeat=SLOTS)))
ORDERS = np.array(list(itertools.permutations(range(SLOTS))))
OBJECTIVE = MDLM(vocab_size=TOKENS + 1, mask_id=MASK)


def logits(params, z):
  """Returns a linear function of what stands in all slots, `[..., 4, 4]`."""
  seen = jax.nn.one_hot(z, TOKENS + 1).reshape(*z.shape[:-1], -1)
  return (seen @ params).reshape(*z.shape, TOKENS + 1)


def denoise(params, inputs):
  return ModelOutputs(hidden=logits(params, inputs.latent))


def log_trajectory(params, answer, order):
  """Returns log of the probability of an answer in an order, the order given."""
  rank = jnp.argsort(order)

  def term(k):
    z = jnp.where(rank < k, answer, MASK)
    log_p = jax.nn.log_softmax(logits(params, z)[..., :TOKENS])
    return log_p[order[k], answer[order[k]]]

  return sum(term(k) for k in range(SLOTS))


ALL = jax.vmap(
  jax.vmap(log_trajectory, (None, None, 0)), (None, 0, None)
)  # [81, 24]


@functools.cache
def world():
  """Returns (parameters, rewards, probabilities [81, 24], true gradient)."""
  rng = np.random.default_rng(0)
  size = SLOTS * (TOKENS + 1)
  params = jnp.asarray(rng.normal(size=(size, size)) * 0.7, jnp.float32)
  rewards = rng.normal(size=len(ANSWERS)).astype(np.float32)

  @jax.jit
  def expected(params):
    p = jnp.exp(ALL(params, ANSWERS, ORDERS)) / len(ORDERS)
    return jnp.sum(p * rewards[:, None]), p

  (_, p), gradient = jax.value_and_grad(expected, has_aux=True)(params)
  assert abs(float(p.sum()) - 1) < 1e-5
  return params, rewards, np.asarray(p), np.asarray(gradient)


def rollouts(rng, count):
  """Returns answers as they are sampled, with what each is worth."""
  _, rewards, p, _ = world()
  flat = p.ravel() / p.sum()
  drawn = rng.choice(len(flat), count, p=flat)
  answer, order = np.divmod(drawn, len(ORDERS))
  whole = np.ones((count, SLOTS), bool)
  worth = rewards[answer] - np.sum(p.sum(axis=1) * rewards)
  batch = Rollouts(
    tokens=ANSWERS[answer].astype(np.int32),
    loss_mask=whole,
    segment_ids=whole.astype(np.int32),
    positions=np.broadcast_to(np.arange(SLOTS, dtype=np.int32), whole.shape),
    region=whole,
    ending=~whole,
    round=np.argsort(ORDERS[order], axis=1).astype(np.int32),
    advantage=np.repeat(worth[:, None], SLOTS, axis=1).astype(np.float32),
    seed=rng.integers(0, 2**31 - 1, count).astype(np.int32),
    batch_seed=np.full(count, rng.integers(0, 2**31 - 1), np.int32),
    place=(np.arange(count) / count).astype(np.float32),
    share=np.full(count, 1 / count, np.float32),
  )
  return batch, worth


def updates(method, batches, count=64):
  """Returns minus the gradient of a method's loss on each of some batches."""
  params = world()[0]
  rng = np.random.default_rng(1)

  @jax.jit
  def descent(batch):
    views = method.views(OBJECTIVE, Process(), batch)

    def loss(params):
      say = functools.partial(denoise, params)
      scores = method.scores(OBJECTIVE, Process(), say, views, batch)
      lost = method.loss(scores, views, batch)
      return lost.total / lost.weight

    return -jax.grad(loss)(params)

  found = []
  for _ in range(batches):
    batch, worth = rollouts(rng, count)
    weight = method.coefficients(worth)[:, None]
    found.append(
      descent(
        batch.replace(
          advantage=np.repeat(weight, SLOTS, axis=1).astype(np.float32)
        )
      )
    )
  return np.stack(found).reshape(batches, -1)


def along(found, direction):
  """Returns mean and standard error of what updates have of a direction."""
  each = found @ direction
  return each.mean(), each.std(ddof=1) / len(each) ** 0.5


METHODS = (
  TraceRL(beta=0.0, shrink=1, views_a_row=SLOTS, ends=SLOTS),
  DiffuGRPO(beta=0.0),
  CoupledGRPO(beta=0.0),
  ESPO(beta=0.0),
  SPG(masking="random"),
  WD1(),
)


def gain(found):
  """Returns the part of updates along the true gradient, and its error."""
  gradient = world()[3].ravel()
  return along(found, gradient / np.linalg.norm(gradient))


@pytest.mark.parametrize(
  "method",
  [METHODS[0], *map(quick.long, METHODS[1:])],
  ids=[m.name for m in METHODS],
)
def test_updates_point_up(method):
  found = updates(method, 200)
  mean, error = gain(found)
  assert mean > 3 * error
  gradient = world()[3].ravel()
  whole = found.mean(axis=0)
  # Of the mean's square, what is only noise of the estimate.
  noise = found.var(axis=0, ddof=1).sum() / len(found)
  size = max(whole @ whole - noise, 1e-12) ** 0.5
  cosine = mean / size
  print(
    f"{method.name}: along the true gradient {mean:.4g} +- {error:.2g}"
    f" (its norm {np.linalg.norm(gradient):.4g}), cosine {cosine:.3f}"
  )


def test_trajectories_are_unbiased():
  # A view a token: the mean over its 4 views is a quarter of the gradient.
  gradient = world()[3].ravel() / SLOTS
  found = updates(METHODS[0], 200)
  error = found.std(axis=0, ddof=1) / len(found) ** 0.5
  sure = error > 1e-9
  z = (found.mean(axis=0) - gradient)[sure] / error[sure]
  # The largest of 256 normal numbers.
  np.testing.assert_array_less(np.abs(z), 4.5)
  mean, spread = gain(found)
  assert abs(mean - np.linalg.norm(gradient)) < 3 * spread

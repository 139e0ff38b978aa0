"""Rollouts of recorded cases, and what our network and losses say of them."""

import dataclasses
import functools

import jax
import numpy as np

from dllm_jax.posttraining.reinforcement.methods.value import (
  value_loss,
  values,
)
from dllm_jax.posttraining.reinforcement.rollouts import rows
from tests import golden_cases
from tests.sampling import published


class Recorded:
  """A case with its network.

  Attributes:
    config: options.
    arrays: inputs and expected outputs.
    objective: of the case's network.
  """

  def __init__(self, name, **fields):
    case, self._name = golden_cases.load(name), name
    self.config, self.arrays = case.config, case.arrays
    # A value model's head has no place in a network of tokens.
    self._model = published.model(name, leave_out=("value_head.weight",))
    self.objective = dataclasses.replace(self._model.objective, **fields)
    self.params = self._model.params
    self._say_it = jax.jit(self._say, static_argnums=0)
    self._all = jax.jit(self._lose, static_argnums=0)

  def rows(self, seen=False):
    """Returns the case's rows; `seen`: whether prompts' padding is."""
    a = self.arrays
    tokens = np.concatenate([a["prompt_ids"], a["completion_ids"]], axis=1)
    given = a["prompt_ids"].shape[1]
    size = a["completion_ids"].shape[1]
    found = rows(
      tokens,
      np.full(len(tokens), given),
      size,
      (self.config["eos_token_id"],),
    )
    np.testing.assert_array_equal(
      found.loss_mask[:, given:], a["completion_mask"] > 0
    )
    if not seen:
      segments = found.segment_ids.copy()
      segments[:, :given] = a["prompt_mask"]
      found = found.replace(segment_ids=segments)
    return found.replace(
      advantage=np.repeat(a["advantages"][:, None], tokens.shape[1], axis=1)
    )

  def behind(self, values):
    """Returns values of completions `[N, C]` at their slots of whole rows."""
    given = self.arrays["prompt_ids"].shape[1]
    return np.pad(np.asarray(values), [(0, 0), (given, 0)])

  def _say(self, method, params, views, batch):
    denoise = lambda inputs: self._model.denoiser.apply(params, inputs, None)[0]
    process = self.objective.init(jax.random.key(0))
    return method.scores(self.objective, process, denoise, views, batch)

  def _lose(self, methods, params, views, batch):
    """Returns scores, the losses of methods, and the first one's gradient."""

    def lose(params):
      scores = self._say(methods[0], params, views, batch)
      return value(methods[0].loss(scores, views, batch)), scores

    gradient, scores = jax.grad(lose, has_aux=True)(params)
    lost = [method.loss(scores, views, batch) for method in methods]
    return scores, gradient, [(value(one), one.metrics) for one in lost]

  def scores(self, method, views, batch):
    """Returns what the network says."""
    return self._say_it(method, self.params, views, batch)

  def weight(self, name):
    """Returns a recorded array of weights."""
    return golden_cases.weights(self._name)[name]

  def value_gradient(self, head, views, batch, clip):
    """Returns a value model's loss, its values, and the gradient of both parts."""
    process = self.objective.init(jax.random.key(0))

    def lose(params, head):
      denoise = lambda x: self._model.denoiser.apply(params, x, None)[0]
      new = values(self.objective, process, denoise, head, views, batch)
      return value_loss(new, views, batch, clip), new

    grad = jax.jit(jax.value_and_grad(lose, argnums=(0, 1), has_aux=True))
    (loss, new), gradient = grad(self.params, head)
    return loss, new, gradient

  def said(self, methods, views, batch):
    """Returns scores, and (loss, metrics) of each method."""
    scores, _, lost = self._all(tuple(methods), self.params, views, batch)
    return scores, lost

  def check_gradient(self, prefix, methods, views, batch):
    """Checks two arrays of the first method's gradient.

    Returns:
      The scores, and (loss, metrics) of each method.
    """
    scores, gradient, lost = self._all(
      tuple(methods), self.params, views, batch
    )
    norm = next(
      self.arrays[f"{prefix}_grad_{n}"]
      for n in ("ln_f", "norm")
      if f"{prefix}_grad_{n}" in self.arrays
    )
    same(gradient["final_norm"]["scale"], norm)
    want = self.arrays[f"{prefix}_grad_q_proj_0"]
    q = np.asarray(gradient["layers"]["attention"]["q"]["kernel"][0])
    same(q.reshape(want.shape[1], -1).T, want)
    return scores, lost


def same(found, want, tolerance=1e-5):
  """Checks arrays up to a part of their largest entry."""
  want = np.asarray(want)
  np.testing.assert_allclose(
    found, want, rtol=0, atol=tolerance * max(np.abs(want).max(), 1e-30)
  )


def near(found, want):
  """Checks a loss, the mean of terms of order 1 that may cancel."""
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


def value(lost):
  """Returns a loss as a number."""
  return lost.total / lost.weight


@functools.cache
def recorded(name, **fields):
  """Returns a case, once."""
  return Recorded(name, **fields)


def halves(tree, part, parts):
  """Returns one of some equal runs of rows."""

  def cut(x):
    size = len(x) // parts
    return x[part * size : (part + 1) * size]

  return jax.tree.map(cut, tree)

r"""A judge of pictures, and how far drawn ones are from real ones.

The judge is a small classifier, trained here on the pictures that the model was
trained on, with their captions for classes. Under its features, with means m and
covariances S of drawn (d) and real (r) pictures, the Frechet distance is

    |m_d - m_r|^2 + tr(S_d + S_r - 2 (S_d S_r)^{1/2})

(arXiv:1706.08500): of Gaussians with those moments. It is biased upwards in few
pictures; its standard error is that of resampled ones (bootstrap).
"""

from collections.abc import Sequence
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
import numpy as np
import optax

from dllm_jax.models.images.classifier import Classifier
from dllm_jax.parallel import compilation

_BATCH = 100


class Judge:
  """A trained classifier of pictures.

  Attributes:
    classes: the captions, in the order of the logits.
    params: the classifier's parameters.
  """

  def __init__(self, classes: Sequence[str], params: PyTree):
    self.classes, self.params = tuple(classes), params

  @functools.cached_property
  def _program(self):
    return compilation.jit(Classifier(classes=len(self.classes)).apply)

  def look(
    self, pictures: Float[np.ndarray, "B H W 3"]
  ) -> tuple[Int[np.ndarray, "B"], Float[np.ndarray, "B width"]]:
    """Returns the class and the features of pictures in [-1, 1]."""
    chosen, features = [], []
    for start in range(0, len(pictures), _BATCH):
      part = pictures[start : start + _BATCH]
      room = [(0, _BATCH - len(part)), (0, 0), (0, 0), (0, 0)]
      logits, own = self._program(self.params, np.pad(part, room))
      chosen.append(np.argmax(logits, axis=-1)[: len(part)])
      features.append(np.asarray(own)[: len(part)])
    return np.concatenate(chosen), np.concatenate(features)


def trained(
  pictures: Float[np.ndarray, "B H W 3"],
  labels: Int[np.ndarray, "B"],
  classes: Sequence[str],
  *,
  epochs: int = 4,
  seed: int = 0,
) -> Judge:
  """Returns a judge of pictures in [-1, 1], trained on some.

  Args:
    pictures: to train on.
    labels: the class of each.
    classes: what the classes are called.
    epochs: how often each picture is seen.
    seed: of the first parameters, and of the order.

  Raises:
    ValueError: there are fewer pictures than a batch has.
  """
  if len(pictures) < _BATCH:
    raise ValueError(
      f"a judge of pictures needs at least {_BATCH} to train on, not"
      f" {len(pictures)}: give more pictures"
    )
  network = Classifier(classes=len(classes))
  steps = epochs * (len(pictures) // _BATCH)
  optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

  def loss(params, x, y):
    logits, _ = network.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

  def step(params, state, x, y):
    gradient = jax.grad(loss)(params, x, y)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  def begin(key, x):
    params = network.init(key, x)
    return params, optimizer.init(params)

  params, state = compilation.jit(begin)(
    jax.random.key(seed), jnp.asarray(pictures[:_BATCH])
  )
  program, rng = compilation.jit(step), np.random.default_rng(seed)
  for _ in range(epochs):
    order = rng.permutation(len(pictures))
    for start in range(0, len(order) - _BATCH + 1, _BATCH):
      own = order[start : start + _BATCH]
      params, state = program(params, state, pictures[own], labels[own])
  return Judge(classes, params)


def frechet_distance(
  drawn: Float[Array, "n D"], real: Float[Array, "m D"]
) -> float:
  """Returns the Frechet distance of features, as Gaussians."""
  drawn, real = (np.asarray(x, np.float64) for x in (drawn, real))
  gap = drawn.mean(0) - real.mean(0)
  one, other = np.cov(drawn, rowvar=False), np.cov(real, rowvar=False)
  # Of products of covariances eigenvalues are real and at least 0.
  roots = np.sqrt(np.maximum(np.linalg.eigvals(one @ other).real, 0.0))
  return float(gap @ gap + np.trace(one) + np.trace(other) - 2 * roots.sum())


def with_error(
  drawn: Float[Array, "n D"],
  real: Float[Array, "m D"],
  *,
  resamples: int = 30,
  seed: int = 0,
) -> tuple[float, float]:
  """Returns the Frechet distance and its standard error, by the bootstrap."""
  rng = np.random.default_rng(seed)
  again = lambda x: x[rng.integers(len(x), size=len(x))]
  found = [
    frechet_distance(again(drawn), again(real)) for _ in range(resamples)
  ]
  return frechet_distance(drawn, real), float(np.std(found, ddof=1))

"""The Frechet distance in closed form, and a judge that learns."""

import numpy as np
import pytest

from dllm_jax.evaluation.samples import pictures


def gaussian(seed, n, mean, deviation):
  """Returns draws whose mean and covariance are exact."""
  x = np.random.default_rng(seed).normal(size=(n, len(mean)))
  x -= x.mean(0)
  x @= np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
  return x * deviation + mean


def test_distance_of_gaussians():
  """|m - m'|^2 + sum (s - s')^2, for diagonal covariances."""
  one = gaussian(0, 500, [0.0, 1.0, 2.0], [1.0, 2.0, 0.5])
  other = gaussian(1, 400, [1.0, 1.0, 0.0], [2.0, 2.0, 1.5])
  found = pictures.frechet_distance(one, other)
  np.testing.assert_allclose(found, (1 + 4) + (1 + 0 + 1), rtol=1e-9)
  np.testing.assert_allclose(pictures.frechet_distance(one, one), 0, atol=1e-9)


def test_distance_of_turned_covariances():
  """Of commuting covariances in any basis it is that of their roots."""
  turn = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
  one = gaussian(3, 300, [0.0, 0.0, 0.0], [1.0, 2.0, 3.0]) @ turn
  other = gaussian(4, 300, [0.0, 0.0, 0.0], [3.0, 2.0, 1.0]) @ turn
  found = pictures.frechet_distance(one, other)
  np.testing.assert_allclose(found, 4 + 0 + 4, rtol=1e-9)


def test_error_shrinks_with_pictures():
  def error(n):
    rng = np.random.default_rng(5)
    drawn, real = rng.normal(size=(2, n, 4))
    return pictures.with_error(drawn, real)[1]

  few, many = error(50), error(800)
  assert 0 < many < few / 4


@pytest.mark.all
def test_a_judge_learns():
  rng = np.random.default_rng(6)
  labels = rng.integers(2, size=400)
  seen = rng.normal(size=(400, 8, 8, 3)).astype(np.float32) * 0.3
  seen[labels == 1, :, :4] += 1.0
  judge = pictures.trained(
    seen[:300], labels[:300], ["left", "right"], epochs=12
  )
  chosen, features = judge.look(seen[300:])
  assert np.mean(chosen == labels[300:]) > 0.95
  assert features.shape == (100, 64)


def test_too_few_pictures():
  with pytest.raises(ValueError, match="at least 100 to train on, not 3"):
    pictures.trained(np.zeros((3, 8, 8, 3)), np.zeros(3, int), ["a", "b"])

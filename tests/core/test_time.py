"""Rules that draw training times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.time import draw_times


@pytest.mark.parametrize("shape", [(8, 1), (3, 4), (7,)])
def test_stratified_has_one_time_in_each_stratum(shape):
  t = np.asarray(draw_times(jax.random.key(0), shape, "stratified"))
  n = t.size
  assert t.shape == shape
  # Row-major: entry i of the flattened shape lies in [i / n, (i + 1) / n).
  np.testing.assert_array_equal(np.floor(t.ravel() * n), np.arange(n))
  inside = t.ravel() * n - np.arange(n)
  assert np.ptp(inside) > 0.1  # an own uniform in each stratum


def test_shared_offset_is_one_uniform_and_even_steps():
  t = np.asarray(draw_times(jax.random.key(3), (16, 1), "shared_offset"))
  assert t.min() >= 0.0 and t.max() < 1.0
  # float32 rounding near 1 is 6e-8.
  np.testing.assert_allclose(np.diff(np.sort(t.ravel())), 1 / 16, atol=3e-7)


@pytest.mark.parametrize("rule", ["independent", "stratified", "shared_offset"])
def test_every_entry_is_uniform_over_keys(rule):
  keys = jax.random.split(jax.random.key(5), 2000)
  t = jax.vmap(lambda key: draw_times(key, (4, 1), rule))(keys)
  assert float(t.min()) >= 0.0 and float(t.max()) < 1.0
  # The mean over entries is 1/2; independent draws spread most.
  assert abs(float(t.mean()) - 0.5) < 4 * np.sqrt(1 / 12 / t.size)
  if rule == "shared_offset":
    each = t.mean(axis=0)
    assert np.all(abs(each - 0.5) < 4 * np.sqrt(1 / 12 / 2000))


def test_low_discrepancy_lowers_the_spread_of_the_mean():
  keys = jax.random.split(jax.random.key(6), 500)
  spread = {
    rule: float(
      jnp.std(
        jax.vmap(lambda k, r=rule: draw_times(k, (16, 1), r).mean())(keys)
      )
    )
    for rule in ("independent", "stratified")
  }
  # Theory: sqrt(1/12/16) = 0.0722 and sqrt(1/12/16^3) = 0.0045.
  assert spread["stratified"] < 0.1 * spread["independent"]


def test_unknown_rule_names_the_legal_ones():
  with pytest.raises(ValueError, match="legal: independent, stratified"):
    draw_times(jax.random.key(0), (4, 1), "antithetic")

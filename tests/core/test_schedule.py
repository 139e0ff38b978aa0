"""Noise schedules: end points, derivatives, small times, weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.schedule import Linear, LogLinear, Polynomial, SCHEDULES

_ALL = [cls() for cls in SCHEDULES.values()] + [
  Polynomial(power=0.5),
  Polynomial(power=3.0, floor=1e-4, ceiling=1 - 1e-4),
]
_NAMED = pytest.mark.parametrize("schedule", _ALL, ids=repr)


@_NAMED
def test_end_points(schedule):
  ends = np.asarray(schedule.alpha(jnp.array([0.0, 1.0])))
  if hasattr(schedule, "sigma_min"):
    expected = np.exp([-schedule.sigma_min, -schedule.sigma_max])
  else:
    expected = [schedule.ceiling, schedule.floor]
  np.testing.assert_allclose(ends, expected, atol=2e-7)


@_NAMED
def test_alpha_falls_and_dalpha_is_its_derivative(schedule):
  t = jnp.linspace(0.01, 0.99, 61)
  alpha, dalpha = schedule.alpha(t), schedule.dalpha(t)
  assert np.all(np.diff(alpha) <= 0.0) and np.all(dalpha <= 0.0)
  slope = jax.vmap(jax.grad(schedule.alpha))(t)
  np.testing.assert_allclose(dalpha, slope, rtol=2e-4, atol=1e-6)


@_NAMED
def test_sigma_masked_and_weight_agree_with_alpha(schedule):
  t = jnp.linspace(0.05, 0.9, 35)
  alpha, dalpha = (
    np.asarray(f(t), np.float64) for f in (schedule.alpha, schedule.dalpha)
  )
  # 1 - alpha itself is rounded to 6e-8.
  np.testing.assert_allclose(
    schedule.masked(t), 1 - alpha, rtol=1e-4, atol=1e-7
  )
  sigma = np.asarray(schedule.sigma(t), np.float64)
  np.testing.assert_allclose(np.exp(-sigma), alpha, rtol=1e-4, atol=1e-8)
  np.testing.assert_allclose(schedule.dsigma(t), -dalpha / alpha, rtol=1e-3)
  np.testing.assert_allclose(
    schedule.weight(t), -dalpha / (1 - alpha), rtol=1e-3
  )


@pytest.mark.parametrize(
  "schedule", [s for s in _ALL if getattr(s, "ceiling", 0.0) == 1.0], ids=repr
)
def test_small_times_do_not_cancel(schedule):
  t = 1e-5
  with jax.enable_x64(True):
    exact = schedule.masked(jnp.float64(t))
  found = schedule.masked(jnp.float32(t))
  np.testing.assert_allclose(found, exact, rtol=1e-5)


@pytest.mark.parametrize("schedule", _ALL, ids=repr)
def test_networks_are_told_a_number_at_every_time(schedule):
  t = jnp.linspace(0.0, 1.0, 101)
  told = np.asarray(schedule.told(t))
  assert np.isfinite(told).all() and (np.diff(told) >= 0).all()
  np.testing.assert_allclose(told[:95], schedule.sigma(t)[:95], rtol=1e-6)


def test_weight_of_linear_masks_is_one_over_t():
  t = jnp.array([1e-3, 0.1, 0.5, 1.0])
  for schedule in (Linear(), LogLinear(), Linear(floor=0.2)):
    np.testing.assert_allclose(schedule.weight(t), 1 / t, rtol=1e-6)


def test_loglinear_is_the_published_formula():
  t = np.linspace(0.0, 1.0, 11)
  np.testing.assert_allclose(
    LogLinear().sigma(jnp.asarray(t, jnp.float32)),
    -np.log1p(-(1 - 1e-3) * t),
    rtol=1e-5,
    atol=1e-7,
  )


@_NAMED
def test_schedules_are_static_values(schedule):
  assert schedule == dataclasses.replace(schedule)
  assert hash(schedule) == hash(dataclasses.replace(schedule))


@pytest.mark.parametrize(
  "make",
  [
    lambda: Linear(floor=0.5, ceiling=0.5),
    lambda: Linear(floor=-0.1),
    lambda: Linear(ceiling=1.1),
    lambda: Polynomial(power=0.0),
    lambda: SCHEDULES["geometric"](sigma_min=0.0),
    lambda: SCHEDULES["sigma_linear"](sigma_min=2.0, sigma_max=1.0),
  ],
)
def test_impossible_schedules_are_refused(make):
  with pytest.raises(ValueError, match="not"):
    make()

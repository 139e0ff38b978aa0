"""Wavelengths for longer contexts, against their formulas in float64."""

import functools
import math

import jax
import numpy as np
import pytest

from dllm_jax.models import rotary

DIM, THETA = 16, 500_000.0


def turned(scaling, positions):
  """Returns cosines and sines of our tables."""
  run = functools.partial(
    rotary.rotary_tables, dim=DIM, theta=THETA, scaling=scaling
  )
  tables = jax.jit(run)(positions[None])
  return [np.asarray(table)[0, :, 0] for table in tables]


def llama3(i, factor, first, low, high):
  """Returns the frequency of a pair, by cases on its wavelength."""
  f = THETA ** (-2 * i / DIM)
  wavelength = 2 * math.pi / f
  if wavelength < first / high:
    return f
  if wavelength > first / low:
    return f / factor
  smooth = (first / wavelength - low) / (high - low)
  return (1 - smooth) * f / factor + smooth * f


def yarn(i, factor, first, slow, fast, whole):
  """Returns the frequency of a pair as a blend of two."""
  f = THETA ** (-2 * i / DIM)
  at = lambda r: DIM * math.log(first / (r * 2 * math.pi)) / math.log(THETA) / 2
  low, high = at(fast), at(slow)
  if whole:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, DIM - 1)
  ramp = min(max((i - low) / (high - low), 0), 1)
  return f / factor * ramp + f * (1 - ramp)


CASES = {
    "none": (rotary.Unscaled(), lambda i: THETA ** (-2 * i / DIM), 1.0),
    "linear": (
        rotary.Linear(factor=4.0), lambda i: THETA ** (-2 * i / DIM) / 4, 1.0),
    "llama3": (
        rotary.Llama3(factor=8.0, first_length=8192, low=1.0, high=4.0),
        lambda i: llama3(i, 8.0, 8192, 1.0, 4.0), 1.0),
    "yarn": (
        rotary.Yarn(factor=4.0, first_length=32768),
        lambda i: yarn(i, 4.0, 32768, 1, 32, True), 0.1 * math.log(4) + 1),
    "yarn, not whole": (
        rotary.Yarn(factor=2.0, first_length=512, whole=False, scale=1.5),
        lambda i: yarn(i, 2.0, 512, 1, 32, False), 1.5),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_closed_forms(name):
  scaling, frequency, scale = CASES[name]
  positions = np.array([0, 1, 7, 100, 1000])
  f = np.array([frequency(i) for i in range(DIM // 2)])
  angles = positions[:, None] * f
  cos, sin = turned(scaling, positions)
  # float32 angles up to 1000 radians are right to 6e-5.
  np.testing.assert_allclose(cos, scale * np.cos(angles), atol=2e-4)
  np.testing.assert_allclose(sin, scale * np.sin(angles), atol=2e-4)


def test_some_pairs_are_kept_and_some_slowed():
  plain = np.array([THETA ** (-2 * i / DIM) for i in range(DIM // 2)])
  for name, factor in (("llama3", 8), ("yarn", 4)):
    run = functools.partial(CASES[name][0].slow, dim=DIM, theta=THETA)
    slowed = plain / np.asarray(jax.jit(run)(plain))
    assert np.isclose(slowed[0], 1) and np.isclose(slowed[-1], factor)
    assert ((slowed > 1.01) & (slowed < factor - 0.01)).any()


def test_what_is_refused():
  with pytest.raises(ValueError, match="factor of rotary scaling is 0.5"):
    rotary.Linear(factor=0.5)
  with pytest.raises(ValueError, match="give 0 < low < high"):
    rotary.Llama3(factor=2.0, first_length=64, low=4.0, high=4.0)


def test_both_ways_to_rotate_are_one():
  x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype(np.float32)
  positions = np.arange(10).reshape(2, 5)

  @jax.jit
  def both(x):
    tables = rotary.rotary_tables(positions, dim=8, theta=10.0)
    return rotary._by_pairs(x, *tables), rotary._by_halves(x, *tables)

  pairs, halves = both(x)
  np.testing.assert_allclose(pairs, halves, atol=1e-6)

"""BD3-LM: clip intervals, their search, blocks drawn again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.objectives.bd3lm import (
  BD3LM,
  choose_clip,
  clip_candidates,
  clip_variances,
)
from tests.objectives import toy

_LENGTH, _VOCAB, _MASK = 4, 4, 3
_X0 = np.array([2, 0, 1, 1])
_SPACE = {"vocab_size": _VOCAB, "mask_id": _MASK}
_KEY, _STEP = jax.random.key(0), jnp.int32(0)


def test_clip_bounds_are_data_and_move_without_recompiling():
  objective = BD3LM(**_SPACE, length=_LENGTH, block_size=2)
  data = toy.batch(np.tile(_X0, (64, 1)))
  draw = jax.jit(lambda p, k: objective.draw(p, k, data, step=_STEP).t)
  process = objective.init(_KEY)
  for low, high in ((1e-3, 1.0), (0.3, 0.8), (0.45, 0.95)):
    t = np.asarray(draw(objective.clipped(process, (low, high)), _KEY))
    assert t.min() >= low - 1e-6 and t.max() <= high + 1e-6
    u = (t[:, ::2] - low) / (high - low) * 128  # stratified over rows x blocks
    assert np.all(abs(np.floor(u.ravel() + 1e-3) - np.arange(128)) <= 1)
  assert draw._cache_size() == 1


def test_heavy_masking_weighs_evenly():
  objective = BD3LM(**_SPACE, length=_LENGTH, block_size=2)
  process = objective.clipped(objective.init(_KEY), (0.55, 0.95))
  t = jnp.full((1, _LENGTH), 0.6)
  assert np.all(np.asarray(objective.emphasis(process, None, t)) == 1.0)
  light = objective.clipped(process, (0.45, 0.95))
  np.testing.assert_allclose(objective.emphasis(light, None, t), 1 / 0.6)


def test_resampled_blocks_lie_in_the_clip_interval():
  objective = BD3LM(
    **_SPACE,
    length=_LENGTH,
    block_size=4,
    clip_low=0.3,
    clip_high=0.8,
    resample=True,
  )
  data = toy.batch(np.tile(_X0, (2000, 1)))
  drawn = toy.draw(objective, objective.init(_KEY), _KEY, data)
  share = np.asarray(drawn.z == _MASK).mean(1)
  assert set(share) == {0.5, 0.75}


def test_clip_search_finds_the_quiet_interval():
  # Under a network that knows nothing, the loss of a block is its masked share
  # over t times a constant: its variance falls with t.
  objective = BD3LM(**_SPACE, length=_LENGTH, block_size=2)
  process = objective.init(_KEY)
  data = toy.batch(np.tile(_X0, (64, 1)))
  flat = toy.Attention(length=_LENGTH, tokens=_VOCAB)
  flat.near = 0.0 * flat.near
  candidates = clip_candidates(objective, widths=(0.5, 0.7), stride=0.1)
  assert candidates.shape == (1 + 6 + 4, 2)
  variances = jax.jit(
    lambda key: clip_variances(objective, process, flat, key, data, candidates)
  )(_KEY)
  chosen = choose_clip(objective, process, candidates, variances)
  np.testing.assert_allclose(chosen.state["clip"], [0.5, 1.0], atol=1e-6)
  assert float(variances[0]) == pytest.approx(float(variances.max()))

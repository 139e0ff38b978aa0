"""BD3-LM: clip intervals, their search, blocks drawn again."""

import json
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.objectives.bd3lm import BD3LM
from dllm_jax.run import timing
from tests import runs
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
  t = np.full((1, _LENGTH), 0.6, np.float32)
  assert np.all(np.asarray(objective.emphasis(process, None, t, None)) == 1.0)
  light = objective.clipped(process, (0.45, 0.95))
  np.testing.assert_allclose(objective.emphasis(light, None, t, None), 1 / 0.6)


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
  objective = BD3LM(
    **_SPACE,
    length=_LENGTH,
    block_size=2,
    clip_search_widths=(0.5, 0.7),
    clip_search_delta=0.1,
  )
  process = objective.init(_KEY)
  data = toy.batch(np.tile(_X0, (64, 1)))
  flat = toy.Attention(length=_LENGTH, tokens=_VOCAB)
  flat.near = 0.0 * flat.near
  assert objective.clip_candidates().shape == (1 + 6 + 4, 2)
  variances = jax.jit(lambda key: objective.measure(process, flat, key, data))(
    _KEY
  )
  chosen = objective.adapt(process, variances)
  np.testing.assert_allclose(chosen.state["clip"], [0.5, 1.0], atol=1e-6)
  assert float(variances[0]) == pytest.approx(float(variances.max()))


_SEARCHED = {
  "objective__name": "bd3lm",
  "objective__block_size": 4,
  "objective__clip_search_widths": (0.5,),
  "objective__clip_search_delta": 0.25,
  "data__length": 16,
  "model__layers": 1,
  "evaluation__every_steps": 2,
  "checkpoint__every_steps": 2,
  "training__steps": 3,
}


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
  """Returns a finished run that searched its clip interval once."""
  run = runs.run(tmp_path_factory.mktemp("searched") / "run", **_SEARCHED)
  run.train()
  return run


@pytest.mark.all
def test_a_run_moves_the_clip_interval_and_compiles_nothing(searched):
  clip = np.asarray(searched.state.process.state["clip"])
  assert searched.program.step._cache_size() == 1
  log = (searched.workdir / "metrics.jsonl").read_text().splitlines()
  ends = [
    (row["clip_low"], row["clip_high"])
    for row in map(json.loads, log)
    if "clip_low" in row
  ]
  np.testing.assert_allclose(ends[:2], [(1e-3, 1.0)] * 2)
  np.testing.assert_allclose(ends[2], clip)
  assert np.isclose(clip[1] - clip[0], 0.5, atol=2e-3)


@pytest.mark.all
def test_a_run_that_is_resumed_where_it_would_search_searches(
  searched, tmp_path
):
  clip = np.asarray(searched.state.process.state["clip"])
  shutil.copytree(searched.workdir, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
  run = runs.run(tmp_path / "run", **_SEARCHED)
  assert run.train()["step"] == 3
  np.testing.assert_array_equal(run.state.process.state["clip"], clip)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
  """Returns runs of MDLM and of its blocks: length 256, width 384, on XLA."""
  size = {
    "data__length": 256,
    "model__width": 384,
    "model__layers": 4,
    "model__heads": 6,
    "training__batch_size": 2,
  }
  return [
    runs.run(
      tmp_path_factory.mktemp(name) / "run",
      objective__name=name,
      evaluation__batch_size=2,
      **size,
    )
    for name in ("mdlm", "bd3lm")
  ]


@pytest.mark.all
def test_a_step_costs_at_most_twice_mdlms_products(compared):
  whole, blocks = (x.model_flops() for x in compared)
  assert blocks <= 2.2 * whole


@pytest.mark.all
def test_a_step_takes_at_most_2_2_times_mdlms(compared):
  """The median of five rounds in turns, in CPU time: machines are shared."""
  states, programs, ratios = [x.program.init() for x in compared], [], []
  for run in compared:
    with jax.set_mesh(run.mesh):
      batch, step, _ = timing.compiled(run)
    programs.append((step, batch))
  for _ in range(6):
    seconds = []
    for i, run in enumerate(compared):
      start = time.process_time()
      step, batch = programs[i]
      with jax.set_mesh(run.mesh):
        states[i], _ = timing.bare(step, states[i], batch, 2)
      seconds.append(time.process_time() - start)
    ratios.append(seconds[1] / seconds[0])
  ratio = float(np.median(ratios[1:]))  # the first round warms up
  print(f"a step of bd3lm takes {ratio:.2f} times one of mdlm: {ratios}")
  assert ratio <= 2.2

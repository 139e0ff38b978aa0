"""Parameters in bfloat16: what becomes of updates smaller than their gaps."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.run.run import Run
from tests import runs

FIELDS = {
  "training__steps": 8,
  "optimizer__learning_rate": 1e-5,
  "optimizer__schedule": "constant",
  "optimizer__warmup_steps": 0,
  "evaluation__batches": 1,
}


def _trained(path, **fields):
  """Returns a run of 8 small steps, how far each weight went, and masters."""
  run = runs.run(path, **FIELDS | fields)
  with jax.set_mesh(run.mesh):
    fresh = run.program.init()
  before = jax.tree.map(np.float32, fresh.params["model"])
  run.train()
  after = run.state.params["model"]
  moved = jax.tree.map(lambda a, b: np.float32(a) - b, after, before)
  return run, np.concatenate([x.ravel() for x in jax.tree.leaves(moved)])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  return _trained(tmp_path_factory.mktemp("plain") / "run")


def test_masters_move_as_float32_does(plain, tmp_path):
  low = {"model__param_dtype": "bfloat16", "model__dtype": "bfloat16"}
  run, moved = _trained(tmp_path / "run", **low)
  assert {x.dtype for x in jax.tree.leaves(run.state.params["model"])} == {
    np.dtype(np.float32)
  }
  # Adam's first steps are as long as the rate, in whatever precision.
  ratio = np.abs(moved).mean() / np.abs(plain[1]).mean()
  assert 0.8 < ratio < 1.25
  # Whoever opens the run has the network's own type, rounded once.
  opened = Run.open(tmp_path / "run", devices=jax.devices())
  for served, master in zip(
    jax.tree.leaves(opened.state.params["model"]),
    jax.tree.leaves(opened.load(masters=True).params["model"]),
    strict=True,
  ):
    assert served.dtype == jnp.bfloat16 and master.dtype == jnp.float32
    np.testing.assert_array_equal(served, master.astype(jnp.bfloat16))
  assert opened.sample(length=16).texts


def test_rounding_to_the_nearest_loses_updates_and_says_so(plain, tmp_path):
  low = {"model__param_dtype": "bfloat16", "optimizer__rounding": "nearest"}
  with pytest.warns(
    UserWarning, match="of the first updates are lost.*masters"
  ):
    run, moved = _trained(tmp_path / "run", **low)
  assert np.abs(moved).mean() < 0.3 * np.abs(plain[1]).mean()
  text = (tmp_path / "run" / "metrics.jsonl").read_text()
  first = json.loads(text.splitlines()[0])
  assert first["lost_updates"] > 0.5


def test_stochastic_rounding_moves_on_average(plain, tmp_path):
  low = {"model__param_dtype": "bfloat16", "optimizer__rounding": "stochastic"}
  run, moved = _trained(tmp_path / "run", **low)
  leaves = jax.tree.leaves(run.state.params["model"])
  assert {x.dtype for x in leaves} == {jnp.dtype(jnp.bfloat16)}
  # The mean of what moved, along the signs that float32 took.
  signs = np.sign(plain[1])
  ratio = (moved * signs).mean() / (plain[1] * signs).mean()
  assert 0.6 < ratio < 1.4
  again, _ = _trained(tmp_path / "again", **low)
  for a, b in zip(
    leaves, jax.tree.leaves(again.state.params["model"]), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_frozen_parameters_have_no_masters(tmp_path):
  fields = {
    "model__param_dtype": "bfloat16", "model__lora_rank": 2,
    "training__ema_decay": 0.9,
  }  # fmt: skip
  run = runs.run(tmp_path / "run", **FIELDS | fields)
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    run.program.abstract.params["model"]
  ):
    adapter = "lora_" in jax.tree_util.keystr(path)
    assert leaf.dtype == (jnp.float32 if adapter else jnp.bfloat16), path
  kinds = {x.dtype for x in jax.tree.leaves(run.program.abstract.ema_params)}
  assert kinds == {jnp.dtype(jnp.float32)}


def test_an_unknown_rounding_is_named(tmp_path):
  with pytest.raises(ValueError, match="optimizer.rounding 'up'; legal: none"):
    runs.run(tmp_path / "run", optimizer__rounding="up")

"""Runs whose weights are frozen: what is saved, kept, and read back."""

import logging
import shutil

import jax
import numpy as np
import pytest

from dllm_jax.training.checkpoint import Checkpoints
from dllm_jax.training.frozen import join, split
from tests import runs

ADAPTER = {"name": "dora", "rank": 2, "targets": ".*attention/[qv]"}
FIELDS = {"model__adapter": ADAPTER, "checkpoint__every_steps": 2}


def test_what_is_split_is_joined():
  params = {"a": {"b": 1, "c": 2}, "d": {}, "e": {"f": {"g": 3}}}
  trains = {"a": {"b": True, "c": False}, "d": {}, "e": {"f": {"g": True}}}
  trained, frozen = split(params, trains)
  assert trained == {"a": {"b": 1}, "e": {"f": {"g": 3}}}
  assert frozen == {"a": {"c": 2}, "d": {}}
  assert join(trained, frozen) == params
  assert split(params, None) == (params, {})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run of six steps, saved every other one."""
  run = runs.run(tmp_path_factory.mktemp("whole") / "run", **FIELDS)
  run.train()
  return run


def _same(one, other):
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(a, b)


def _names(tree):
  return {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.all
def test_only_what_trains_has_an_average_and_an_optimisers_state(whole):
  state = whole.state
  adapters = {"lora_a", "lora_b", "lora_magnitude"}
  assert _names(state.ema_params) == adapters
  sizes = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  trained = sizes(state.ema_params)
  assert 2 * trained <= sizes(state.opt_state) < 2 * trained + 20
  assert adapters < _names(state.eval_params["model"])


@pytest.mark.all
def test_step_0_holds_the_rest_and_stays(whole):
  folder = whole.workdir / "checkpoints"
  assert sorted(int(p.name) for p in folder.iterdir()) == [0, 4, 6]
  text = lambda step: (folder / str(step) / "state/_METADATA").read_text()
  assert "embedding" in text(0) and "lora_a" not in text(0)
  assert "lora_a" in text(6) and "embedding" not in text(6)


@pytest.mark.all
def test_a_run_that_is_resumed_is_the_same_from_any_step(whole, tmp_path):
  """Also where newer checkpoints are damaged, and back to step 0."""
  for left in ([0, 4], [0]):
    copy = tmp_path / str(len(left))
    shutil.copytree(whole.workdir, copy)
    for step in {0, 4, 6} - set(left):
      shutil.rmtree(copy / "checkpoints" / str(step))
    again = runs.run(copy, **FIELDS)
    # The same program: nothing is compiled again.
    again.__dict__["program"] = whole.program
    again.train()
    _same(again.state, whole.state)


def test_a_damaged_newest_checkpoint_falls_back(whole, tmp_path, caplog):
  copy = tmp_path / "run"
  shutil.copytree(whole.workdir, copy)
  for file in (copy / "checkpoints" / "6" / "state").rglob("*"):
    if file.is_file():
      file.write_bytes(b"")
  with (
    caplog.at_level(logging.WARNING, logger="dllm_jax"),
    jax.set_mesh(whole.mesh),
    Checkpoints(copy, writes=False) as checkpoints,
  ):
    state, _ = whole.program.restore(checkpoints)
  assert int(state.step) == 4 and "checkpoint 6" in caplog.text


def test_a_damaged_step_0_is_named(whole, tmp_path, caplog):
  copy = tmp_path / "run"
  shutil.copytree(whole.workdir, copy)
  shutil.rmtree(copy / "checkpoints" / "0")
  with (
    caplog.at_level(logging.WARNING, logger="dllm_jax"),
    jax.set_mesh(whole.mesh),
    Checkpoints(copy, writes=False) as checkpoints,
    pytest.raises(ValueError, match="no checkpoint in .* can be read"),
  ):
    whole.program.restore(checkpoints)
  assert "step 0, which holds what does not train" in caplog.text


@pytest.mark.all
@pytest.mark.parametrize("base", ["default", "nf4"])
def test_another_mesh_restores_and_learns_the_same(base, tmp_path):
  fields = FIELDS | {
    "model__adapter": ADAPTER | {"base": base},
    "model__width": 128,
  }
  one = runs.run(tmp_path / "run", **fields | {"training__steps": 2})
  one.train()
  meshes = ({"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2})
  states = []
  for i, mesh in enumerate(meshes):
    shutil.copytree(one.workdir, tmp_path / str(i))
    axes = {f"mesh__{name}": size for name, size in mesh.items()}
    fields |= {"training__steps": 4} | axes
    run = runs.run(tmp_path / str(i), **fields)
    run.train()
    states.append(runs.parameters(run.state))
  for a, b in zip(*states, strict=True):
    if a.dtype == np.float32:
      np.testing.assert_allclose(a, b, atol=2e-4)
    else:
      np.testing.assert_array_equal(a, b)


@pytest.mark.all
@pytest.mark.parametrize("base", ["int8", "int4", "nf4"])
def test_weights_in_few_bits_are_resumed(base, tmp_path):
  fields = FIELDS | {"model__adapter": ADAPTER | {"base": base}}
  whole = runs.run(tmp_path / "whole", **fields | {"training__steps": 4})
  whole.train()
  for steps in (2, 4):
    parts = runs.run(tmp_path / "parts", **fields | {"training__steps": steps})
    parts.train()
  _same(whole.state, parts.state)

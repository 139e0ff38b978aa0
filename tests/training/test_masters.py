"""Parameters in bfloat16: what becomes of updates smaller than their gaps."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.config import config
from dllm_jax.pretrained import files
from dllm_jax.run import exchange
from dllm_jax.run.run import Run
from tests import runs
from tests.pretrained import golden
from tests.quick import long

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


@pytest.mark.all
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


@pytest.mark.all
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


@pytest.mark.all
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
    "model__param_dtype": "bfloat16",
    "model__adapter": {"name": "lora", "rank": 2},
    "training__ema_decay": 0.9,
  }  # fmt: skip
  run = runs.run(tmp_path / "run", **FIELDS | fields)
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    run.program.abstract.params["model"]
  ):
    adapter = "lora_" in jax.tree_util.keystr(path)
    assert leaf.dtype == (jnp.float32 if adapter else jnp.bfloat16), path
  # Nor an average: adapters alone have one.
  averaged = jax.tree_util.tree_leaves_with_path(
    run.program.abstract.ema_params
  )
  assert averaged
  for path, leaf in averaged:
    assert "lora_" in jax.tree_util.keystr(path)
    assert leaf.dtype == jnp.float32


@pytest.mark.all
@pytest.mark.parametrize("rounding", [long("none"), "stochastic"])
def test_a_run_that_is_resumed_is_the_same(rounding, tmp_path):
  """Two steps, and two more after a restart, are four, bit for bit."""
  fields = FIELDS | {
    "model__param_dtype": "bfloat16", "optimizer__rounding": rounding,
    "training__ema_decay": 0.9, "checkpoint__every_steps": 2,
  }  # fmt: skip
  whole = runs.run(tmp_path / "whole", **fields | {"training__steps": 4})
  whole.train()
  for steps in (2, 4):
    parts = runs.run(tmp_path / "parts", **fields | {"training__steps": steps})
    parts.train()
  assert int(parts.state.step) == 4
  saved = lambda state: jax.tree.leaves((
    state.params,
    state.ema_params,
    state.opt_state,
  ))
  for one, other in zip(saved(whole.state), saved(parts.state), strict=True):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
  """Runs of one published folder, 4 steps from it, by the type of import."""
  root = tmp_path_factory.mktemp("tuned")
  source = golden.publish("llada_logits", root / "in")
  words = golden.plain("llada_logits")[:60]
  rows = np.random.default_rng(0).choice(words, (60, 12))
  text = root / "numbers.txt"
  text.write_text("\n".join(" ".join(map(str, row)) for row in rows))
  found = {}
  for dtype in ("float32", "bfloat16"):
    exchange.import_folder(source, root / dtype, dtype=dtype, length=24)
    before = Run.open(root / dtype).state.params["model"]
    resolved = config.stored(root / dtype)
    assert resolved.optimizer.learning_rate == 1e-5
    resolved.data.path = str(text)
    resolved.optimizer.update(warmup_steps=0, schedule="constant")
    resolved.training.update(steps=4, batch_size=8)
    resolved.logging.update(progress=False, tensorboard=False)
    resolved.evaluation.update(batches=1, batch_size=8)
    one = jax.devices()[:1]
    run = Run.create(resolved, root / dtype, devices=one)
    run.train()
    after = run.state.params["model"]
    moved = jax.tree.map(lambda a, b: np.float32(a) - b, after, before)
    found[dtype] = np.concatenate([x.ravel() for x in jax.tree.leaves(moved)])
  return root, found


@pytest.mark.all
def test_an_imported_folder_learns_as_float32_does(tuned):
  _, moved = tuned
  wide, low = moved["float32"], moved["bfloat16"]
  assert 0.9 < np.abs(low).mean() / np.abs(wide).mean() < 1.1
  assert np.corrcoef(wide, low)[0, 1] > 0.8


@pytest.mark.all
def test_a_tuned_folder_goes_back_in_its_type_or_as_masters(tuned):
  root, _ = tuned
  run = Run.open(root / "bfloat16")
  kinds = {x.dtype for x in jax.tree.leaves(run.state.params["model"])}
  assert kinds == {jnp.dtype(jnp.bfloat16)}
  exchange.export_run(root / "bfloat16", root / "out", dtype="bfloat16")
  exchange.export_run(root / "bfloat16", root / "masters", dtype="float32")
  low = files.read_tensors(root / "out")
  masters = files.read_tensors(root / "masters")
  assert low.keys() == masters.keys()
  finer = 0
  for name, tensor in low.items():
    x, master = np.asarray(tensor), np.asarray(masters[name])
    assert x.dtype == jnp.bfloat16 and master.dtype == np.float32
    np.testing.assert_array_equal(x, master.astype(jnp.bfloat16))
    finer += np.sum(x.astype(np.float32) != master)
  assert finer


@pytest.mark.all
def test_adapters_train_and_their_frozen_matrices_do_not(tmp_path):
  low = {
    "model__param_dtype": "bfloat16",
    "model__adapter": {"name": "lora", "rank": 2},
    "optimizer__rounding": "stochastic", "training__ema_decay": 0.9,
    "training__microbatches": 2,
  }  # fmt: skip
  _, moved = _trained(tmp_path / "run", **low)
  run = Run.open(tmp_path / "run", devices=jax.devices()[:1])
  with jax.set_mesh(run.mesh):
    fresh = run.program.init()
  changed = jax.tree.map(
    lambda a, b: bool((a != b).any()), run.state.params, fresh.params
  )
  for path, does in jax.tree_util.tree_leaves_with_path(changed):
    assert does == ("lora_" in jax.tree_util.keystr(path)), path
  assert moved.any()


def test_an_unknown_rounding_is_named(tmp_path):
  with pytest.raises(ValueError, match="optimizer.rounding 'up'; legal: none"):
    runs.run(tmp_path / "run", optimizer__rounding="up")

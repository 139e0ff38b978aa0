"""Runs that begin with another's parameters."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.models import merge_adapters
from dllm_jax.run import begin
from tests import runs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Liking:
  beta: float = 0.1


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  run = runs.run(tmp_path_factory.mktemp("begin") / "source")
  run.train()
  (run.workdir / "published").mkdir()
  (run.workdir / "published" / "config.json").write_text("{}")
  return run


@pytest.fixture(scope="module")
def begun(source):
  output = source.workdir.parent / "begun"
  return begin(source, output, _config(), Liking())


def _config(**fields):
  return runs.tiny(data__path="pairs.jsonl", **fields)


def _leaves(tree):
  return [np.asarray(x) for x in jax.tree.leaves(jax.device_get(tree))]


def _same(a, b):
  for x, y in zip(_leaves(a), _leaves(b), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.all
def test_begins_with_averages(source, begun):
  assert int(begun.state.step) == 0
  _same(begun.state.params, source.state.ema_params)
  newest = zip(_leaves(begun.state.params), _leaves(source.state.params))
  assert any((x != y).any() for x, y in newest)


@pytest.mark.all
def test_is_an_ordinary_run(source, begun):
  opened = runs.Run.open(begun.workdir, devices=jax.devices()[:1])
  assert opened.tokenizer == source.tokenizer
  assert opened.config.data.path == "pairs.jsonl"
  assert (begun.workdir / "published" / "config.json").read_text() == "{}"
  record = json.loads((begun.workdir / "method.json").read_text())
  assert record["method"] == "liking" and record["beta"] == 0.1


@pytest.mark.all
def test_goes_on_with_the_same_method_only(source, begun):
  begin(source, begun.workdir, _config(), Liking())
  with pytest.raises(ValueError, match=r"otherwise \(beta: 0.1 -> 0.2\)"):
    begin(source, begun.workdir, _config(), Liking(beta=0.2))
  other = runs.run(source.workdir.parent / "other")
  with pytest.raises(ValueError, match="source: "):
    begin(other, begun.workdir, _config(), Liking())
  with pytest.raises(ValueError, match="liking did not begin"):
    begin(source, other.workdir, _config(), Liking())


def test_a_start_that_was_cut_off_is_made_anew(source, begun, tmp_path):
  run = begin(source, tmp_path / "run", _config(), Liking())
  (run.workdir / "config.json").unlink()
  again = begin(source, run.workdir, _config(), Liking())
  _same(again.state.params, begun.state.params)


def test_nothing_of_others_is_touched(source, tmp_path):
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(ValueError, match="holds no run"):
    begin(source, tmp_path, _config(), Liking())
  assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_another_network_is_refused(source, tmp_path):
  with pytest.raises(ValueError, match="only adapters and types"):
    begin(source, tmp_path / "wide", _config(model__width=32), Liking())
  assert not (tmp_path / "wide").exists()


@pytest.mark.all
def test_adapters_are_multiplied_out(source, tmp_path, monkeypatch):
  run = runs.run(
    tmp_path / "source", model__adapter={"name": "lora", "rank": 2}
  )
  run.start()
  ones = lambda path, x: jnp.ones_like(x) if path[-1].key == "lora_b" else x
  params = jax.tree_util.tree_map_with_path(ones, run.state.params)
  state = run.state.replace(params=params)
  monkeypatch.setattr(run, "load", lambda: state)
  begun = begin(run, tmp_path / "begun", _config(), Liking())
  merged = merge_adapters(params["model"], run.network)
  _same(begun.state.params["model"], merged)

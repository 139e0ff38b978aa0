"""Configurations: defaults, overrides, and messages for what is wrong."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.cli import command
from dllm_jax.config import config, files
from dllm_jax.data.tokenizer import Bytes, Characters
from dllm_jax.objectives import registry
from tests.objectives import toy


def test_every_bundled_config_builds():
  for name in files.bundled():
    resolved = config.load(name)
    parsed = config.parse(resolved)
    objective, denoiser = parsed.build(Bytes())
    assert objective.vocab_size <= Bytes().vocab_size
    # What is written into a working directory reads back the same.
    again = config.resolve(json.loads(resolved.to_json()))
    assert config.differences(resolved.to_dict(), again.to_dict()) == []


def test_every_objective_has_a_recipe_and_a_small_twin():
  """The published one states its source; the other is for a laptop."""
  source = re.compile("arXiv:|published shape")
  recipes, twins = set(), set()
  for name in files.bundled():
    resolved = config.load(name)
    if resolved.data.path == "shakespeare":
      twins.add(resolved.objective.name)
    elif source.search(files.find(name).read_text()):
      recipes.add(resolved.objective.name)
  assert recipes == twins == set(registry.objectives())


@pytest.mark.all
def test_every_bundled_network_has_its_shapes():
  """Those of a network are computed once, without an array."""
  seen = set()
  for name in files.bundled():
    parsed = config.parse(config.load(name))
    objective, denoiser = parsed.build(Bytes())
    network = parsed.network(objective)
    if network in seen:
      continue
    seen.add(network)
    batch = toy.batch(np.zeros((1, 32), np.int32))

    def init(key, objective=objective, denoiser=denoiser, batch=batch):
      process = objective.init(key)
      t, z = jnp.ones((1, 1)), objective.clean(process, batch.tokens)
      return denoiser.init(key, objective.inputs(process, z, t, batch))

    shapes = jax.eval_shape(init, jax.random.key(0))
    layers = {len(x.shape) and x.shape[0] for x in jax.tree.leaves(shapes)}
    assert {run.layers for run in network.runs} <= layers, name


def test_every_bundled_config_has_a_smoke_size():
  for name in files.bundled():
    parsed = config.parse(config.load(f"{name}:smoke"))
    assert parsed.training.steps <= 30 and parsed.data.path == "shakespeare"


def test_every_field_is_documented():
  for cls in (*config._SECTIONS.values(), *config._NETWORKS.values()):
    for field in dataclasses.fields(cls):
      assert f"{field.name}:" in cls.__doc__, f"{cls.__name__}.{field.name}"


@pytest.mark.parametrize(
  "given, words",
  [
    ({"traning": {}}, "did you mean 'training'"),
    ({"training": {"stepz": 3}}, "did you mean 'steps'"),
    ({"objective": {"name": "mdlm", "block": 3}}, "config.objective.block"),
    ({"model": {"name": "mamba"}}, "legal: .*transformer"),
    (
      {"objective": {"schedule": {"name": "square"}}},
      "unknown name 'square'; legal: linear",
    ),
  ],
)
def test_unknown_names_are_errors(given, words):
  with pytest.raises(ValueError, match=words):
    config.resolve(given)


def test_unknown_objective_names_the_known_ones():
  with pytest.raises(KeyError, match="legal: .*mdlm"):
    config.resolve({"objective": {"name": "gpt"}})


@pytest.mark.parametrize(
  "given",
  [
    {"training": {"steps": 0}},
    {"training": {"batch_size": 6, "microbatches": 4}},
    {"training": {"ema_decay": 1.0}},
    {"evaluation": {"passes": 1}},
    {"checkpoint": {"keep": 0}},
    {"sampler": {"top_p": 0.0}},
    {"sampler": {"preset": "fastest"}},
  ],
)
def test_illegal_values_are_errors(given):
  with pytest.raises(ValueError):
    config.parse(config.resolve(given))


def test_only_some_fields_may_change():
  old = config.resolve({}).to_dict()
  new = config.resolve({
    "training": {"steps": 7},
    "mesh": {"fsdp": 2},
    "checkpoint": {"keep": 5},
    "logging": {"every_steps": 3},
  }).to_dict()
  assert config.differences(old, new) == []
  new = config.resolve({"training": {"seed": 1}}).to_dict()
  assert config.differences(old, new) == ["config.training.seed: 0 -> 1"]


def test_a_name_in_a_file_is_never_imported():
  with pytest.raises(KeyError):
    config.resolve({"objective": {"name": "os"}})
  with pytest.raises(KeyError):
    config.resolve({"objective": {"name": "base"}})


CONFIG = "from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({})"


def test_a_base_is_another_file(tmp_path):
  write = lambda name, given: (tmp_path / f"{name}.py").write_text(
    CONFIG.replace("{}", repr(given))
  )
  write(
    "mine",
    {
      "base": "shakespeare",
      "training": {"steps": 7},
      "objective": {"name": "mdlm", "time_epsilon": 0.5},
    },
  )
  write("next", {"base": "mine", "objective": {"name": "udlm"}})
  base = config.load("shakespeare")
  mine = config.load(str(tmp_path / "mine.py"))
  following = config.load(str(tmp_path / "next.py"))
  assert mine.model == base.model and mine.training.steps == 7
  assert mine.objective.time_epsilon == 0.5
  # Fields of the same objective are kept, those of another are not.
  assert mine.objective.schedule == base.objective.schedule
  assert following.training.steps == 7
  assert following.objective.time_epsilon == 1e-3
  write("lost", {"base": "nowhere"})
  with pytest.raises(FileNotFoundError, match="nowhere"):
    config.load(str(tmp_path / "lost.py"))


def test_a_base_is_looked_for_from_its_file(tmp_path, monkeypatch):
  """Wherever the command runs, and whatever the files are called."""

  def write(name, given):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(CONFIG.replace("{}", repr(given)))
    return str(path)

  monkeypatch.setenv("HOME", str(tmp_path))
  monkeypatch.chdir(tmp_path)
  # One may have the name of the bundled config that it is based on.
  own = write("own/shakespeare.py", {"base": "shakespeare", "data": {"length": 8}})  # fmt: skip
  assert config.load(own).model == config.load("shakespeare").model
  for base in ("../own/shakespeare.py", "~/own/shakespeare.py"):
    path = write("mine/a.py", {"base": base, "training": {"steps": 7}})
    assert config.load(path).data.length == 8
    assert config.load(path).training.steps == 7
  # The same words from the working directory are another file.
  write("smoke.py", {"data": {"length": 4}})
  for base in ("smoke.py", "./smoke.py", "/nonexistent/smoke.py"):
    path = write("mine/b.py", {"base": base})
    with pytest.raises(FileNotFoundError, match="a bundled one is 'smoke'"):
      config.load(path)
  write("mine/c.py", {"base": "d"})
  path = write("mine/d.py", {"base": "c"})
  with pytest.raises(ValueError, match="d.py -> .*c.py -> .*d.py"):
    config.load(path)


def test_choices_inside_choices():
  resolved = config.resolve({
    "objective": {
      "name": "gidd",
      "noise": {"name": "sigmoid", "schedule": "cosine", "slope": 2},
    }
  })
  assert resolved.objective.noise.schedule.name == "cosine"
  objective, _ = config.parse(resolved).build(Characters("abc"))
  assert objective.noise.slope == 2.0
  assert type(objective.noise.schedule).__name__ == "Cosine"


@pytest.mark.parametrize("network", ["transformer", "dit"])
def test_networks_are_told_the_time_where_objectives_need_it(network):
  given = {"objective": {"name": "md4"}, "model": {"name": network}}
  config.parse(config.resolve(given)).build(Characters("abc"))
  given["model"] |= {"name": "dit", "adaptive": False}
  with pytest.raises(ValueError, match="conditioned True"):
    config.parse(config.resolve(given)).build(Characters("abc"))


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("linear_beta", "config.objective.schedule: unknown name 'linear_beta'; l"),
    ("cosine", None),
  ],
)
def test_a_choice_is_named_on_the_command_line(name, words):
  resolved = config.load("shakespeare_d3pm_uniform")
  resolved.objective.schedule.name = name  # as an override does
  if words is None:
    config.parse(resolved).build(Characters("abc"))
    return
  with pytest.raises(ValueError, match=words):
    config.parse(resolved).build(Characters("abc"))


def test_a_choice_with_fields_of_another_is_refused():
  resolved = config.load("shakespeare")
  resolved.objective.schedule.name = "geometric"
  with pytest.raises(ValueError, match="geometric has no field ceiling, floor"):
    config.parse(resolved).build(Characters("abc"))


def test_a_batch_may_be_given_in_tokens():
  resolved = config.load("shakespeare")
  resolved.training.batch_tokens = 8 * resolved.data.length
  resolved.training.microbatches = 4
  assert config.parse(resolved).training.batch_size == 8
  resolved.training.batch_tokens += 1
  with pytest.raises(ValueError, match="must be a multiple of data.length 128"):
    config.parse(resolved)


def test_another_choice_on_the_command_line_has_its_own_fields():
  argv = [
    "--config.objective.noise.schedule.name=polynomial",
    "--config.objective.noise.schedule.power=0.2",
    "--config.objective.noise.name=sigmoid",
    "--config.objective.noise.slope=2.0",
    "--config.optimizer.name=adamw",
  ]
  before = config.load("shakespeare_gidd")
  after, rest = command.overridden(before, argv)
  assert not rest
  noise = after.objective.noise
  assert (noise.name, noise.slope) == ("sigmoid", 2.0)
  assert (noise.schedule.name, noise.schedule.power) == ("polynomial", 0.2)
  # A name of what has no other fields leaves those that there are.
  assert after.optimizer.learning_rate == before.optimizer.learning_rate
  same, _ = command.overridden(
    before, [f"--config.objective.noise.name={before.objective.noise.name}"]
  )
  assert same.to_dict() == before.to_dict()
  with pytest.raises(ValueError, match="unknown field config.objective.noise"):
    command.overridden(before, [argv[2], "--config.objective.noise.height=1"])

"""Paths as users type them: `~` is the home directory, wherever one is given."""

import numpy as np
import pytest

import dllm_jax
from dllm_jax.cli import command as commands
from dllm_jax.cli.commands import (
  chat,
  convert,
  evaluate,
  harness,
  plan,
  prepare,
  sample,
  serve,
  train,
)
from dllm_jax.cli.commands.reports import compare, report
from dllm_jax.config import files
from dllm_jax.core import paths
from dllm_jax.data import record
from dllm_jax.evaluation.tasks import likelihood
from dllm_jax.objectives import d3pm_matrix
from dllm_jax.reports import report as reports
from dllm_jax.run import Run

PLACES = {
  train: ["workdir"],
  sample: ["workdir", "prompts", "trace"],
  chat: ["workdir"],
  serve: ["workdir", "api_key_file"],
  evaluate: ["workdir"],
  convert: ["workdir", "from_hf", "to_hf"],
  prepare: ["input", "output"],
  plan: ["output"],
  compare: ["output"],
  report: ["output"],
}


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path / "home"))
  (tmp_path / "home").mkdir()
  monkeypatch.chdir(tmp_path)
  return tmp_path / "home"


@pytest.mark.parametrize(
  ("command", "flag"), [(c, f) for c, flags in PLACES.items() for f in flags]
)
def test_flags_expand_the_home_directory(command, flag, home):
  values = commands.parse(command.COMMAND, [f"--{flag}=~/x"])
  assert values[flag].value == str(home / "x")
  for as_it_is in ("", "./x", "shakespeare", "gs://bucket/x"):
    values = commands.parse(command.COMMAND, [f"--{flag}={as_it_is}"])
    assert values[flag].value == as_it_is


@pytest.mark.parametrize(("task", "flag"), [
    ("likelihood", "text"), ("likelihood", "pairs"), ("generation", "judge"),
    ("pareto", "autoregressive"), ("pareto", "judge"), ("planning", "problems"),
    ("planning", "examples"), ("planning", "recipe"), ("reversal", "facts"),
    ("reversal", "diffusion"), ("reversal", "autoregressive"),
])  # fmt: skip
def test_flags_of_tasks_expand_the_home_directory(task, flag, home):
  argv = [f"--task={task}", f"--{flag}=~/x"]
  values = commands.parse(evaluate._variant(argv), argv)
  assert values[flag].value == str(home / "x")


def test_flags_of_the_harness_expand_the_home_directory(home):
  assert harness._expanded("--output_path=~/x") == f"--output_path={home}/x"
  for argument in ("--limit=1", "run", "--model_args=workdir=~/x", "a=~/x"):
    assert harness._expanded(argument) == argument


def test_functions_expand_the_home_directory(home, tmp_path):
  with pytest.raises(FileNotFoundError, match=f"{home}/run"):
    Run.open("~/run")
  with pytest.raises(FileNotFoundError, match=f"{home}/in does not exist"):
    dllm_jax.load_pretrained("~/in")
  with pytest.raises(FileNotFoundError, match=f"{home}/pairs"):
    likelihood._read_pairs("~/pairs.jsonl")
  (home / "mine.py").write_text("x = 1")
  assert files.find("~/mine.py") == home / "mine.py"
  names = reports.labels(["~/a", "~/b"])
  assert names == {"a": home / "a", "b": home / "b"}
  np.save(home / "rows.npy", np.eye(3))
  assert d3pm_matrix.Table(rows="~/rows.npy").kernel(3).shape == (3, 3)
  text = home / "t.txt"
  text.write_text("To be, or not to be")
  record.prepare("~/t.txt", "byte", "~/p", length=4, held_out=0.0, workers=1)
  assert (home / "p").is_dir()
  assert not (tmp_path / "~").exists()


def test_a_home_that_nobody_has_is_named():
  with pytest.raises(ValueError, match="no such home directory"):
    paths.place("~nobody-of-this-name/x")


# A bare name is looked up among the bundled; anything with a folder is a path.
@pytest.mark.parametrize(
  "name",
  [
    "/nonexistent/smoke.py",
    "configs/nowhere/smoke.py",
    "./smoke",
    "~/smoke.py",
    "~/smoke",
    "smoke.py",  # in the working directory, where there is none
  ],
)
def test_a_config_that_does_not_exist_is_no_other(name, home):
  with pytest.raises(FileNotFoundError, match="a bundled one is 'smoke'"):
    files.find(name)


def test_a_bare_name_is_a_bundled_config_whatever_lies_around(home, tmp_path):
  bundled = files.find("smoke")
  for other in ("smoke", "smoke.py"):
    (tmp_path / other).write_text("")
  assert files.find("smoke") == bundled
  assert files.find("smoke.py").resolve() == tmp_path / "smoke.py"


def test_a_file_of_another_kind_is_no_config(home, tmp_path):
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(ValueError, match="is no config: that is a .py file"):
    files.find("./config.json")

"""What is installed and does not go together is one line, before jax starts."""

import ast
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tomllib

from packaging.requirements import Requirement
import pytest

from dllm_jax.cli import installed
from dllm_jax.cli.main import main
from dllm_jax.parallel import compilation

ROOT = pathlib.Path(__file__).parent.parent.parent
JAX = importlib.metadata.version("jax")


def have(monkeypatch, **versions):
  """Makes the metadata say that versions are installed, None for missing."""
  named = {name.replace("_", "-"): found for name, found in versions.items()}
  read, asked = importlib.metadata.version, importlib.metadata.requires

  def version(name):
    if named.get(name, "") is None:
      raise importlib.metadata.PackageNotFoundError(name)
    return named.get(name) or read(name)

  def requires(name):
    # A plugin that is not here: as its wheel says.
    if name == "jax-cuda13-plugin":
      return [f"jax-cuda13-pjrt=={named[name]}"]
    return asked(name)

  monkeypatch.setattr(importlib.metadata, "version", version)
  monkeypatch.setattr(importlib.metadata, "requires", requires)
  monkeypatch.setenv("JAX_PLATFORMS", "")


@pytest.mark.parametrize("versions, message", [
    ({"jax": "0.9.2"}, r"jax 0\.9\.2 is too old: .* 0\.10\.2 or newer: pip"),
    ({"jax": None}, r"jax is missing: .* needs 0\.10\.2"),
    ({"flax": "0.10.4"}, r"flax 0\.10\.4 is too old: .* 0\.12\.8 or newer"),
    ({"jaxlib": "0.8.3"}, r"jaxlib 0\.8\.3 does not go with jax .* jaxlib<=0"),
    ({"libtpu": "0.0.17"}, r"libtpu 0\.0\.17 does not go .* libtpu==0\.0\.\d+"),
    ({"jax_cuda12_plugin": "0.7"}, r"wants jax-cuda12-plugin.*jax\[cuda12\]=="),
    ({"jax_cuda13_plugin": JAX, "jax_cuda13_pjrt": "0.8.1"},
     r"jax-cuda13-pjrt 0\.8\.1 does not go with jax-cuda13-plugin " + JAX),
], ids=str)  # fmt: skip
def test_names_what_is_there_and_what_is_wanted(
  monkeypatch, capsys, versions, message
):
  have(monkeypatch, **versions)
  assert main(["configs"]) == 2
  out, err = capsys.readouterr()
  assert not out and len(err.splitlines()) == 1
  assert re.search(message, err)


def test_what_is_here_goes_together(monkeypatch):
  assert installed.problem("plan") is None
  # Newer ones of the same series, and what is said by nobody.
  have(monkeypatch, jax_cuda13_plugin=JAX, jax_cuda13_pjrt=JAX)
  assert installed.problem("train") is None


def test_a_plugin_that_is_not_used_may_be_any(monkeypatch):
  have(monkeypatch, libtpu="0.0.17")
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  assert installed.problem("train") is None
  assert "libtpu 0.0.17" in installed.problem("plan")
  monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
  assert "libtpu 0.0.17" in installed.problem("train")


def test_an_old_python(monkeypatch, capsys):
  monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
  assert main(["train"]) == 2
  assert "too old: dllm_jax needs 3.11 or newer" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["main", "installed"])
def test_loads_on_old_pythons(name):
  text = (ROOT / "dllm_jax" / "cli" / f"{name}.py").read_text("utf-8")
  ast.parse(text, feature_version=(3, 8))
  assert "from __future__ import annotations" in text


def test_oldest_versions_are_those_of_the_project():
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  named = {Requirement(text).name: text for text in project["dependencies"]}
  for name, oldest in installed.OLDEST.items():
    assert named[name] == f"{name}>={oldest}"
  python = ".".join(map(str, installed.PYTHON))
  assert project["requires-python"] == f">={python}"


@pytest.mark.parametrize("version, given, flags", [
    ("0.10.1", "", ""),
    ("0.10.2", "", "{flag}"),
    ("0.12.0.1", "--xla_a=1", "--xla_a=1 {flag}"),
    ("0.12.0.1", "{flag}DOT", "{flag}DOT"),  # as its user wants
    ("9.0", "--xla_a=1", "--xla_a=1"),  # may not know it, and abort
])  # fmt: skip
def test_flag_of_affected_versions(monkeypatch, version, given, flags):
  have(monkeypatch, jaxlib=version)
  ((option, _),) = compilation._CPU_OPTIONS.items()
  flag = f"--{option}="
  monkeypatch.setenv("XLA_FLAGS", given.format(flag=flag))
  installed.prevent_wrong_products()
  assert os.environ["XLA_FLAGS"] == given.format(flag=flag)  # jax has begun
  monkeypatch.delitem(sys.modules, "jax")
  installed.prevent_wrong_products()
  assert os.environ["XLA_FLAGS"] == flags.format(flag=flag)


@pytest.mark.all
def test_the_command_keeps_wrong_products_out():
  code = (
    "from dllm_jax.cli.main import main\n"
    "assert main(['configs']) == 0\n"
    "from dllm_jax.parallel import compilation\n"
    "assert not compilation.wrong_products()\n"
  )
  subprocess.run(
    [sys.executable, "-W", "error::UserWarning", "-c", code],
    env=os.environ | {"XLA_FLAGS": ""},
    cwd=ROOT,
    check=True,
    capture_output=True,
  )

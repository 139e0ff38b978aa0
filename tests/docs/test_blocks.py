"""What the pages tell a reader to type is legal: the command's own parser says so."""

import ast
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

from dllm_jax.cli import command as parsing
from dllm_jax.cli import main
from dllm_jax.config import config as configs
from tests.docs import blocks

SHELL = blocks.blocks("sh", "bash")
PYTHON = blocks.blocks("python")


def command(name):
  folder = main._FOLDERS.get(name, "")
  module = f"dllm_jax.cli.commands.{folder}{name}"
  return importlib.import_module(module).COMMAND


def check_dllm(name, *argv):
  """Raises if `dllm NAME ...` has a flag, a field or a value that is not legal."""
  if name == "harness":
    return  # lm-evaluation-harness's own
  own, argv = command(name), list(argv)
  if own.positional and argv and not argv[0].startswith("-"):
    assert argv.pop(0) in own.positional
  if own.variant is not None:
    own = own.variant(argv)
  configured = any(a.startswith("--config=") for a in argv)
  if "config" not in own.overrides:
    _, argv = parsing.overridden(configs.resolve({}), argv)
  elif not configured:
    argv = ["--config=smoke", *argv]  # for the fields of a run that is not here
  argv = [
    a.replace("=configs/spans.py", "=smoke") for a in argv
  ]  # the reader's
  parsing.parse(own, argv)


def check(words):
  """Checks one command of a page."""
  while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
    words = words[1:]
  first, rest = words[0], words[1:]
  file = blocks.ROOT / (rest[0] if first.startswith("python") else first)
  wrapped = [a.removeprefix("--wrap=") for a in rest if a.startswith("--wrap=")]
  if first == "dllm":
    check_dllm(*rest)
  elif rest[:2] == ["-m", "dllm_jax"]:
    check_dllm(*rest[2:])
  elif rest[:2] == ["-m", "pytest"]:
    tests = [a for a in rest if a.startswith("tests/")]
    assert tests and all((blocks.ROOT / path).exists() for path in tests)
  elif rest[:1] == ["-m"] and rest[1].startswith("tests."):
    assert importlib.util.find_spec(rest[1])
  elif first == "pip" or rest[:2] == ["-m", "pip"]:
    check_extras(" ".join(rest))
  elif first == "make":
    assert f"\n{rest[0]}:" in (blocks.ROOT / "Makefile").read_text()
  elif first in ("curl", "hf", "lm_eval"):  # others' programs
    pass
  elif wrapped:
    check(shlex.split(wrapped[0]))
  else:
    assert file.is_file(), f"what is {first!r}?"
    if "--" in rest:
      check_dllm(*rest[rest.index("--") + 1 :])


def check_extras(text):
  """Checks that the extras of a `pip install` are the project's."""
  project = tomllib.loads((blocks.ROOT / "pyproject.toml").read_text())
  known = project["project"]["optional-dependencies"]
  for extras in re.findall(r"(?:\.|dllm_jax)\[(.*?)\]", text):
    assert set(extras.split(",")) <= known.keys()


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_are_legal(block):
  if block.why:
    pytest.skip(block.why)
  for words in blocks.commands(block.text):
    check(words)


def test_what_is_not_legal_is_found():
  for line in (
    "dllm train --stepz=1",
    "dllm sample --sampler.preset",
    "make tea",
  ):
    with pytest.raises((ValueError, AssertionError)):
      check(line.split())


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_parses_and_its_imports_are_there(block):
  for node in ast.walk(ast.parse(block.text)):
    if not isinstance(node, ast.ImportFrom) or not node.module:
      continue
    if node.module.split(".")[0] == "dllm_jax":
      module = importlib.import_module(node.module)
      for name in node.names:
        assert hasattr(module, name.name)


def test_every_block_says_what_it_is():
  assert not [str(b) for b in blocks.blocks("")]


@pytest.mark.all
def test_the_first_steps_run(tmp_path):
  """docs/start.md's commands and Python, from a checkout, one after another."""
  page = blocks.ROOT / "docs" / "start.md"
  shell = [b for b in SHELL if b.page == page and "dllm configs" in b.text]
  [python] = [b for b in PYTHON if b.page == page]
  env = os.environ | {
    "PYTHONPATH": str(blocks.ROOT),
    "PATH": f"{tmp_path}:{os.environ['PATH']}",
    "XLA_FLAGS": "",
  }
  program = tmp_path / "dllm"
  program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dllm_jax "$@"\n')
  program.chmod(0o755)
  (tmp_path / "configs").symlink_to(blocks.ROOT / "configs")
  run = lambda *args: subprocess.run(args, cwd=tmp_path, env=env, check=True)
  run("bash", "-euc", shell[0].text)
  run(sys.executable, "-c", python.text)
  assert (tmp_path / "runs" / "smoke" / "metrics.jsonl").is_file()

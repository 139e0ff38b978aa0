"""What docs/prepare.md shows: its YAML, its shell and its Python parse."""

import ast
import pathlib
import re
import subprocess

import yaml

from dllm_jax.cli import command as commands
from dllm_jax.cli.commands import prepare

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "prepare.md").read_text(encoding="utf-8")


def _blocks(kind):
  return re.findall(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)


def test_commands_are_those_of_the_program():
  shown = re.findall(r"dllm prepare\b((?:[^`|\n]|\\\n)*)", TEXT)
  flags = {f for line in shown for f in re.findall(r"--(\w+)", line)}
  assert {"shard", "merge", "input", "output", "tokenizer"} <= flags
  known = {"help", *commands.parse(prepare.COMMAND, [])}
  assert all(flag in known for flag in flags)


def test_kubernetes_starts_again_what_is_no_mistake():
  [text] = _blocks("yaml")
  spec = yaml.safe_load(text)["spec"]
  assert spec["completionMode"] == "Indexed"
  [container] = spec["template"]["spec"]["containers"]
  assert f"$JOB_COMPLETION_INDEX/{spec['completions']}" in container["args"][0]
  [rule] = spec["podFailurePolicy"]["rules"]
  assert rule["onExitCodes"]["values"] == [2]
  assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_python_and_shell_parse():
  for text in _blocks("python"):
    names = {n.attr for n in ast.walk(ast.parse(text)) if hasattr(n, "attr")}
    assert {"prepare", "merge"} <= names
  for text in _blocks("sh"):
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)

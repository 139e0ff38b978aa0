"""`dllm reinforce`: trains a run on what its own samples earn."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

from dllm_jax.cli import command as commands
from dllm_jax.config import config as configs
from dllm_jax.config import files

_LOOP = "reinforce"


def _made(name: str, **fields: Any) -> Any:
  """Returns a method, or what the loop is told, with some fields given."""
  from dllm_jax.posttraining import reinforcement  # pylint: disable=g-import-not-at-top
  from dllm_jax.posttraining.reinforcement import methods  # pylint: disable=g-import-not-at-top

  if name == _LOOP:
    return reinforcement.Reinforce(**fields)
  return methods.by_name(name)(**fields)


def _define(flag: commands.Flags) -> None:
  flag.path("workdir", None, "the run to begin with, which is left as it is")
  flag.path(
    "output",
    None,
    "directory of the new run; by default `reinforced` in --workdir. One that was "
    "begun so continues from its newest checkpoint",
  )
  flag.enum("method", None, files.METHODS, "the loss; by default as --config")


def _variant(argv: Sequence[str]) -> commands.Command:
  """Returns the command with the sections that a configuration states."""
  name, _ = commands.take(argv, "config")
  stated = files.methods(name) if name else {}
  sections = {}
  for section in files.LEARNING:
    given = dict(stated.get(section, {}))
    if section == _LOOP:
      given.pop("method", None)
    legal = {f.name for f in dataclasses.fields(_made(section))}
    if wrong := sorted(given.keys() - legal):
      raise commands.UsageError(
        f"unknown field {section}.{wrong[0]} in {name}; legal:"
        f" {', '.join(sorted(legal))}"
      )
    sections[section] = functools.partial(_made, section, **given)
  return dataclasses.replace(COMMAND, sections=sections)


def _run(argv: list[str]) -> Mapping[str, Any]:
  name, _ = commands.take(argv, "config")
  values = commands.parse(_variant(argv), argv)
  workdir = commands.required(values, "workdir", "runs/countdown")
  stated = files.methods(name) if name else {}
  chosen = values.method or stated.get(_LOOP, {}).get("method", "espo")
  if chosen not in files.METHODS:
    raise commands.UsageError(
      f"unknown reinforce.method {chosen!r}; legal: {', '.join(files.METHODS)}"
    )
  others = [other for other in files.METHODS if other != chosen]
  if wrong := [a for a in argv if a.lstrip("-").split(".")[0] in others]:
    raise commands.UsageError(f"{wrong[0]} means nothing to --method={chosen}")
  resolved = values["config"].value or configs.stored(workdir)

  commands.join()
  from dllm_jax.posttraining.reinforcement import Reinforcement  # pylint: disable=g-import-not-at-top
  from dllm_jax.run.run import Run  # pylint: disable=g-import-not-at-top

  output = values.output or f"{workdir}/reinforced"
  learning = Reinforcement(
    Run.open(workdir, mesh=resolved.mesh.to_dict()),
    output,
    resolved,
    _made(_LOOP, **values[_LOOP].value.to_dict()),
    _made(chosen, **values[chosen].value.to_dict()),
  )
  print(learning.describe(), flush=True)
  return commands.trained(output, learning.train())


COMMAND = commands.Command(
  name="reinforce",
  summary="Trains a copy of a run on its own answers to prompts, by rewards.",
  define=_define,
  run=_run,
  overrides=("config",),
  sections={name: functools.partial(_made, name) for name in files.LEARNING},
  variant=_variant,
)

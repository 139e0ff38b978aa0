"""`dllm evaluate`: evaluates a trained model, with the error of each figure.

What a task is told are the fields of its options (`evaluation/registry.py`): here
they become flags.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import types
import typing
from typing import Any

from dllm_jax.cli import command as commands
from dllm_jax.core import paths

_DEFINE = {bool: "bool", int: "integer", float: "float", str: "string"}


def _define(flag: commands.Flags, task: str = "likelihood") -> None:
  from dllm_jax.evaluation.tasks import registry  # pylint: disable=g-import-not-at-top

  flag.path(
    "workdir",
    None,
    "the run to evaluate; partial results are kept in it, so that the same "
    "command continues",
  )
  listed = "; ".join(
    f"{n}: {registry.task(n).summary}" for n in registry.tasks()
  )
  flag.string(
    "task",
    task,
    f"what to evaluate ({listed}). `--task=NAME --help` lists its own flags",
  )
  flag.use_ema()
  options = registry.task(task).options
  hints = typing.get_type_hints(options)
  for field in dataclasses.fields(options):
    place = field.metadata.get("path")
    kind = "path" if place else _DEFINE[_kind(hints[field.name])]
    define = getattr(flag, kind)
    define(field.name, field.default, field.metadata["help"])


def _kind(hint: Any) -> type:
  """Returns T of a field of type T or `T | None`."""
  if isinstance(hint, types.UnionType):
    return next(t for t in typing.get_args(hint) if t is not type(None))
  return hint


def _variant(argv: Sequence[str]) -> commands.Command:
  """Returns the command with the flags of the task that arguments name."""
  task, _ = commands.take(argv, "task")
  if task is None:
    return COMMAND
  return dataclasses.replace(
    COMMAND, define=functools.partial(_define, task=task)
  )


def _run(argv: list[str]) -> Mapping[str, Any]:
  values = commands.parse(_variant(argv), argv)
  workdir = commands.required(values, "workdir", "runs/mine")

  commands.join()
  from dllm_jax.evaluation.tasks import registry  # pylint: disable=g-import-not-at-top
  from dllm_jax.run.run import Run  # pylint: disable=g-import-not-at-top

  task = registry.task(values.task)
  options = task.options(**{
    field.name: values[field.name].value
    for field in dataclasses.fields(task.options)
  })
  run = Run.open(workdir) if task.opens else None
  configured = registry.SamplerConfig() if run is None else run.config.sampler
  setting = registry.Setting(
    workdir=paths.place(workdir),
    run=run,
    sampler=commands.sampler(values, argv, configured),
    use_ema=values.use_ema,
    progress=True,
  )
  figures = task.run(setting, options)
  print(task.text(figures), flush=True)
  return figures


COMMAND = commands.Command(
  name="evaluate",
  summary=(
    "Evaluates a trained model: each figure with its protocol and its error."
  ),
  define=_define,
  run=_run,
  overrides=("sampler",),
  variant=_variant,
)

"""`dllm distil`: a student that needs fewer network calls than its teacher."""

from collections.abc import Mapping
import functools
from typing import Any

from dllm_jax.cli import command as commands
from dllm_jax.config import config as configs

_METHODS = {"dcd": "DCD", "dparallel": "DParallel", "d3llm": "D3LLM"}


def _method(name: str, **fields: Any) -> Any:
  """Returns a method with some of its fields given."""
  from dllm_jax.posttraining import distillation  # pylint: disable=g-import-not-at-top

  return getattr(distillation, _METHODS[name])(**fields)


def _define(flag: commands.Flags) -> None:
  flag.path("workdir", None, "the teacher: a run, imported or trained")
  flag.path(
    "output", None, "directory of the student; a second start continues"
  )
  flag.enum(
    "method",
    "dparallel",
    list(_METHODS),
    "dparallel and d3llm, for masked diffusion: --config.data.path has"
    " conversations, whose prompts the teacher answers; dcd, for uniform"
    " diffusion: it has text",
  )
  flag.integer("seed", 0, "seed of the teacher's answers")


def _run(argv: list[str]) -> Mapping[str, Any]:
  values = commands.parse(COMMAND, argv)
  workdir = commands.required(values, "workdir", "runs/llada")
  output = commands.required(values, "output", "runs/student")
  others = [name for name in _METHODS if name != values.method]
  if wrong := [a for a in argv if a.lstrip("-").split(".")[0] in others]:
    raise commands.UsageError(
      f"{wrong[0]} means nothing to --method={values.method}"
    )

  resolved = values["config"].value or configs.stored(workdir)

  commands.join()
  from dllm_jax.posttraining.distillation import distil  # pylint: disable=g-import-not-at-top
  from dllm_jax.run.run import Run  # pylint: disable=g-import-not-at-top

  source = Run.open(workdir, mesh=resolved.mesh.to_dict())
  summary = distil(
    source,
    output,
    resolved,
    _method(values.method, **values[values.method].value.to_dict()),
    sampler=commands.sampler(values, argv, source.config.sampler),
    seed=values.seed,
  )
  return commands.trained(output, summary)


COMMAND = commands.Command(
  name="distil",
  summary="Trains a copy of a run that needs fewer network calls for its text.",
  define=_define,
  run=_run,
  overrides=("config", "sampler"),
  sections={name: functools.partial(_method, name) for name in _METHODS},
)

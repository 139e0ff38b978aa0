"""`dllm align`: trains a run on preferences, beginning with another."""

from collections.abc import Mapping
from typing import Any

from dllm_jax.cli import command as commands
from dllm_jax.config import config as configs

_METHODS = ("vrpo",)


def _define(flag: commands.Flags) -> None:
  flag.path("workdir", None, "the run to begin with, which is left as it is")
  flag.path(
    "output",
    None,
    "directory of the new run; one that was begun so continues from its newest "
    "checkpoint",
  )
  flag.string("method", "vrpo", f"the loss: {', '.join(_METHODS)}")
  flag.path(
    "reference", None, "the run to compare with, if it is not --workdir"
  )


def _vrpo() -> Any:
  from dllm_jax.posttraining.vrpo import VRPO  # pylint: disable=g-import-not-at-top

  return VRPO()


def _run(argv: list[str]) -> Mapping[str, Any]:
  values = commands.parse(COMMAND, argv)
  workdir = commands.required(values, "workdir", "runs/tuned")
  output = commands.required(values, "output", "runs/aligned")
  if values.method not in _METHODS:
    raise commands.UsageError(
      f"unknown method {values.method!r}; legal: {', '.join(_METHODS)}"
    )
  resolved = values["config"].value or configs.stored(workdir)

  commands.join()
  from dllm_jax.posttraining.align import Alignment  # pylint: disable=g-import-not-at-top
  from dllm_jax.posttraining.vrpo import VRPO  # pylint: disable=g-import-not-at-top
  from dllm_jax.run.run import Run  # pylint: disable=g-import-not-at-top

  mesh = resolved.mesh.to_dict()
  reference = values.reference
  alignment = Alignment.create(
    Run.open(workdir, mesh=mesh),
    output,
    resolved,
    VRPO(**values["vrpo"].value.to_dict()),
    reference_run=Run.open(reference, mesh=mesh) if reference else None,
  )
  print(alignment.describe(), flush=True)
  return commands.trained(output, alignment.train())


COMMAND = commands.Command(
  name="align",
  summary="Trains a copy of a run on preferences: pairs of a chosen and a"
  " rejected answer, under --config.data.path.",
  define=_define,
  run=_run,
  overrides=("config",),
  sections={"vrpo": _vrpo},
)

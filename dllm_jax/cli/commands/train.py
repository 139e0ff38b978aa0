"""`dllm train`: trains a configuration, or resumes what is in --workdir."""

from collections.abc import Mapping
from typing import Any

from dllm_jax.cli import command as commands
from dllm_jax.config import config as configs
from dllm_jax.core import paths


def _define(flag: commands.Flags) -> None:
  flag.path(
    "workdir",
    None,
    "directory of the run; an existing run continues from its newest "
    "checkpoint",
  )


def _run(argv: list[str]) -> Mapping[str, Any]:
  values = commands.parse(COMMAND, argv)
  workdir = paths.place(commands.required(values, "workdir", "runs/mine"))
  resolved = values["config"].value
  if resolved is None:
    if not (workdir / "config.json").exists():
      raise commands.UsageError(
        f"--config must be given, for example --config=shakespeare "
        f"({workdir} holds no run to resume)"
      )
    resolved = configs.stored(workdir)

  commands.join()
  from dllm_jax.run.run import Run  # pylint: disable=g-import-not-at-top

  run = Run.create(resolved, workdir)
  print(run.describe(), *run.corpus.reports, sep="\n", flush=True)
  return commands.trained(workdir, run.train())


COMMAND = commands.Command(
  name="train",
  summary="Trains a configuration, or resumes what is in --workdir.",
  define=_define,
  run=_run,
  overrides=("config",),
)

"""`dllm evaluate`: evaluates a trained model, with the error of each figure."""

from collections.abc import Mapping
import sys
from typing import Any

from absl import flags

from dllm_jax.cli import command as commands

_TASKS = ("likelihood",)


def _define(values: flags.FlagValues) -> None:
  flags.DEFINE_string(
    "workdir", None, "the run to evaluate", flag_values=values
  )
  flags.DEFINE_enum(
    "task", "likelihood", _TASKS, "what to evaluate", flag_values=values
  )
  flags.DEFINE_integer(
    "passes",
    0,
    "passes over the text; 0 for the run's own number",
    lower_bound=0,
    flag_values=values,
  )
  flags.DEFINE_integer(
    "batches",
    0,
    "at most so many held-out batches; 0 for all",
    lower_bound=0,
    flag_values=values,
  )
  flags.DEFINE_bool(
    "use_ema",
    True,
    "use averaged parameters where the run has them",
    flag_values=values,
  )


def _run(argv: list[str]) -> Mapping[str, Any]:
  values = commands.parse(COMMAND, argv)
  workdir = commands.required(values, "workdir", "runs/mine")
  if values.passes == 1:
    raise commands.UsageError(
      "--passes must be at least 2: the standard error needs two"
    )

  from dllm_jax.run import Run  # pylint: disable=g-import-not-at-top

  run = Run.open(workdir)
  figures = run.evaluate(
    passes=values.passes or None,
    limit=values.batches or None,
    use_ema=values.use_ema,
    progress=sys.stderr.isatty(),
  )
  print(
    f"at most {figures['bits_per_token']:.4f} bits per token "
    f"(standard error {figures['standard_error']:.4f}), "
    f"{figures['bits_per_char']:.4f} bits per character, on "
    f"{figures['tokens']} tokens"
  )
  return figures


COMMAND = commands.Command(
  name="evaluate",
  summary="Evaluates a trained model on held-out text.",
  define=_define,
  run=_run,
)

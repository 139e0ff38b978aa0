"""`dllm report`: one HTML page that compares runs."""

from collections.abc import Mapping
from typing import Any

from absl import flags

from dllm_jax.cli import command as commands


def _define(values: flags.FlagValues) -> None:
  flags.DEFINE_string(
    "workdirs", None, "the runs, with commas between", flag_values=values
  )
  flags.DEFINE_string(
    "output", "report.html", "the page to write", flag_values=values
  )
  flags.DEFINE_integer(
    "batches", 0, "held-out batches to evaluate on; 0 for all",
    lower_bound=0, flag_values=values,
  )  # fmt: skip
  flags.DEFINE_integer(
    "num_samples", 2, "texts of each run; 0 for none", lower_bound=0,
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_integer(
    "rounds", 5, "timed rounds of the sampler", lower_bound=2,
    flag_values=values,
  )  # fmt: skip
  flags.DEFINE_bool(
    "use_ema",
    True,
    "use averaged parameters where a run has them",
    flag_values=values,
  )


def _run(argv: list[str]) -> Mapping[str, Any]:
  values = commands.parse(COMMAND, argv)
  names = commands.required(values, "workdirs", "runs/one,runs/two")

  from dllm_jax.reports import report  # pylint: disable=g-import-not-at-top

  content = report.Content(
    batches=values.batches,
    num_samples=values.num_samples,
    rounds=values.rounds,
    use_ema=values.use_ema,
  )
  return report.report(
    [name for name in names.split(",") if name],
    values.output,
    content,
    progress=True,
  )


COMMAND = commands.Command(
  name="report",
  summary="Writes one HTML page that compares runs: losses, likelihoods, "
  "samples, speed.",
  define=_define,
  run=_run,
)

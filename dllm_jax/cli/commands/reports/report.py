"""`dllm report`: one HTML page that compares runs."""

from collections.abc import Mapping
from typing import Any

from dllm_jax.cli import command as commands


def _define(flag: commands.Flags) -> None:
  flag.string("workdirs", None, "the runs, with commas between")
  flag.path("output", "report.html", "the page to write")
  flag.integer("batches", 0, "held-out batches to evaluate on; 0 for all",
    lower_bound=0)  # fmt: skip
  flag.integer("num_samples", 2, "texts of each run; 0 for none", lower_bound=0)  # fmt: skip
  flag.integer("rounds", 5, "timed rounds of the sampler", lower_bound=2)  # fmt: skip
  flag.bool("use_ema", True, "use averaged parameters where a run has them")


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

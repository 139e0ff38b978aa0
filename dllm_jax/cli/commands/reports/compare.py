"""`dllm compare`: several configurations at one budget, a table and a plot."""

from collections.abc import Mapping
from typing import Any

from dllm_jax.cli import command as commands
from dllm_jax.config import config as configs


def _define(flag: commands.Flags) -> None:
  flag.string(
    "configs",
    None,
    "configurations to compare: files or bundled names, with commas between; "
    "they must read the same data in the same order; --config.path.to.field="
    "value overrides a field of each",
  )
  flag.integer("budget_tokens", None, "tokens that each is trained on", lower_bound=1)  # fmt: skip
  flag.path(
    "output",
    "runs/compare",
    "directory of the runs, the table and the plot; what it holds continues",
  )
  flag.list("seeds", [], "seeds of each run; by default the configurations'")
  flag.integer("points", 8, "evaluations along the way", lower_bound=1)  # fmt: skip


def _run(argv: list[str]) -> Mapping[str, Any]:
  _, rest = commands.overridden(configs.resolve({}), argv)
  values = commands.parse(COMMAND, rest)
  names = commands.required(values, "configs", "shakespeare,shakespeare_md4")
  budget = commands.required(values, "budget_tokens", "4096000")

  commands.join()
  from dllm_jax.reports import compare  # pylint: disable=g-import-not-at-top

  seeds = commands.numbers("seeds", values.seeds, int)
  prepared = compare.prepare(
    [name for name in names.split(",") if name],
    budget,
    values.points,
    change=lambda resolved: commands.overridden(resolved, argv)[0],
  )
  if left := compare.left(prepared, values.output, seeds=seeds):
    seconds = compare.estimate(prepared, values.output, seeds=seeds)
    print(
      f"{left} of {len(prepared) * max(1, len(seeds))} runs are to be trained: "
      f"about {seconds / 60:.0f} minutes here, evaluation aside",
      flush=True,
    )
  result = compare.compare(prepared, values.output, seeds=seeds)
  if result["interrupted"]:
    print("stopped and saved; the same command continues", flush=True)
  if result["rows"]:  # none, where the first seed was stopped
    print(compare.table(result["rows"]), flush=True)
  return result


COMMAND = commands.Command(
  name="compare",
  summary=(
    "Trains several configurations on the same data and compares their "
    "bounds on the same held-out text."
  ),
  define=_define,
  run=_run,
)

"""`dllm scaling`: IsoFLOP curves, their laws, and who needs how much compute."""

from collections.abc import Mapping
from typing import Any

from dllm_jax.cli import command as commands
from dllm_jax.config import config as configs
from dllm_jax.config import files

_SIZES, _SEEDS = ("32x2", "64x2", "96x3", "128x4"), (0,)


def _define(flag: commands.Flags) -> None:
  flag.string(
    "configs",
    None,
    "configurations, the one that others are compared with first: files or "
    "bundled names, with commas between; --config.path.to.field=value overrides a "
    "field of each",
  )
  flag.list("flops", None, "budgets of model FLOPs of training, with commas between")  # fmt: skip
  flag.list("sizes", None, f"networks, WIDTHxLAYERS; by default {','.join(_SIZES)}")  # fmt: skip
  flag.list("seeds", None, "seeds of each run; by default 0")
  flag.string(
    "grid",
    None,
    "a configuration whose grid says what the flags above do not, such as "
    "scaling_text8",
  )
  flag.integer("least_steps", 50, "runs with fewer steps are left out", lower_bound=1)  # fmt: skip
  flag.float(
    "max_hours",
    0.0,
    "hours that the grid may take by its estimate; 0 for any",
    lower_bound=0,
  )
  flag.path(
    "output",
    "runs/scaling",
    "directory of the runs, the table and the plots; what it holds continues",
  )


def _run(argv: list[str]) -> Mapping[str, Any]:
  _, rest = commands.overridden(configs.resolve({}), argv)
  values = commands.parse(COMMAND, rest)
  stated = files.grid(values.grid) if values.grid else {}
  names = [name for name in (values.configs or "").split(",") if name]
  names = names or list(stated.get("configs", ()))
  if not names:
    commands.required(values, "configs", "shakespeare_autoregressive,shakespeare")  # fmt: skip
  flops = values.flops or stated.get("flops")
  if not flops:
    raise commands.UsageError("--flops must be given, for example --flops=1e12,3e12,1e13")  # fmt: skip
  budgets = commands.numbers("flops", flops, float)
  seeds = values.seeds or stated.get("seeds", _SEEDS)
  seeds = commands.numbers("seeds", seeds, int)

  commands.join()
  from dllm_jax.reports import scaling  # pylint: disable=g-import-not-at-top

  grid, left_out = scaling.cells(
    names,
    budgets,
    values.sizes or stated.get("sizes", _SIZES),
    seeds=seeds,
    least_steps=values.least_steps,
    change=lambda resolved: commands.overridden(resolved, argv)[0],
  )
  for line in left_out:
    print(f"left out: {line}", flush=True)
  missing = scaling.missing(grid, values.output)
  if missing:
    cost = scaling.estimate(missing)
    hours, gigabytes = cost["seconds"] / 3600, cost["peak_bytes"] / 2**30
    print(
      f"{len(missing)} of {len(grid)} runs are to be trained: about "
      f"{60 * hours:.0f} minutes here, evaluation aside, and {gigabytes:.2f} GiB "
      "a device",
      flush=True,
    )
    if values.max_hours and hours > values.max_hours:
      raise commands.UsageError(
        f"the grid takes about {hours:.1f} hours, more than --max_hours="
        f"{values.max_hours:g}: smaller --flops, or fewer --sizes or --seeds"
      )
  points, interrupted = scaling.train(grid, values.output)
  if interrupted:
    print("stopped and saved; the same command continues", flush=True)
  result = {"interrupted": interrupted, "runs": len(points), "of": len(grid)}
  if points:
    result |= scaling.write(points, values.output)
    print(result.pop("table"), flush=True)
  return result


COMMAND = commands.Command(
  name="scaling",
  summary=(
    "Trains a grid of sizes at budgets of FLOPs, and fits how the held-out bound "
    "falls with compute: see docs/scaling.md."
  ),
  define=_define,
  run=_run,
)

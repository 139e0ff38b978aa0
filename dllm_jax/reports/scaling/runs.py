"""Training the runs of a grid, each once."""

from collections.abc import Sequence
import json
import os

import jax

from dllm_jax.core import paths
from dllm_jax.core.files import write_whole
from dllm_jax.core.paths import Path
from dllm_jax.reports.scaling.fit import Point
from dllm_jax.reports.scaling.grid import Cell
from dllm_jax.run.run import Run

_FIGURE = "scaling_point.json"


def missing(grid: Sequence[Cell], output: str | os.PathLike) -> list[Cell]:
  """Returns the runs of a grid that have no figure yet."""
  output = paths.place(output)
  return [c for c in grid if not (output / c.place / _FIGURE).exists()]


def train(
  grid: Sequence[Cell],
  output: str | os.PathLike,
  *,
  devices: Sequence[jax.Device] | None = None,
) -> tuple[list[Point], bool]:
  """Trains and evaluates what has no figure yet; a second start goes on.

  Args:
    grid: the runs.
    output: the directory of all of them.
    devices: the devices to use; by default all.

  Returns:
    A point of each run that is done, and whether a signal ended it before the
    last.
  """
  output, points = paths.place(output), []
  for number, cell in enumerate(grid, 1):
    place = output / cell.place / _FIGURE
    if not place.exists():
      run = Run.create(cell.resolved, output / cell.place, devices=devices)
      if run.train()["interrupted"]:
        return points, True
      _write(place, run)
    figures = json.loads(place.read_text(encoding="utf-8"))
    points.append(
      Point(
        config=cell.config,
        budget=cell.budget,
        parameters=cell.parameters,
        tokens=cell.tokens,
        flops=cell.steps * cell.flops,
        **figures,
      )
    )
    print(
      f"{number} of {len(grid)}, {cell.place}: "
      f"{figures['loss']:.4f} +- {figures['error']:.4f} bits per character",
      flush=True,
    )
  return points, False


def _write(place: Path, run: Run) -> None:
  figures = run.evaluate()
  per_char = figures["bits_per_char"] / figures["bits_per_token"]
  found = {
    "loss": figures["bits_per_char"],
    "error": figures["standard_error"] * per_char,
  }
  if jax.process_index() == 0:
    write_whole(place, json.dumps(found) + "\n")

"""Which runs a grid has, and what they will take."""

from collections.abc import Callable, Sequence
import dataclasses
import re
import tempfile
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from dllm_jax.config import config as configs
from dllm_jax.run import timing

_WARMUP = 0.1  # share of a run's steps, at most
_SIZE = re.compile(r"(\d+)x(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """One run of a grid.

  Attributes:
    config: the configuration's name.
    size: its network, `WIDTHxLAYERS`.
    budget: FLOPs that it may spend.
    seed: of its parameters and its data.
    resolved: its configuration.
    parameters: of its network.
    flops: model FLOPs of a train step.
  """

  config: str
  size: str
  budget: float
  seed: int
  resolved: ConfigDict
  parameters: int
  flops: int

  @property
  def steps(self) -> int:
    """Train steps that it takes."""
    return self.resolved.training.steps

  @property
  def tokens(self) -> int:
    """Tokens that it reads."""
    training, length = self.resolved.training, self.resolved.data.length
    return self.steps * training.batch_size * length

  @property
  def place(self) -> str:
    """Its directory under that of the grid."""
    return f"{self.config}/{self.size}-{self.budget:g}-seed{self.seed}"


def cells(
  names: Sequence[str],
  budgets: Sequence[float],
  sizes: Sequence[str],
  *,
  seeds: Sequence[int] = (0,),
  least_steps: int = 50,
  change: Callable[[ConfigDict], ConfigDict] = lambda resolved: resolved,
  devices: Sequence[jax.Device] | None = None,
) -> tuple[list[Cell], list[str]]:
  """Returns the runs of a grid, cheapest first, and what is not among them.

  FLOPs of a step are those of the matrix products of the network, three times
  the forward pass's, counted in the traced program; all that an objective has
  the network do counts, so that BD3-LM's doubled rows cost what they cost.

  Args:
    names: configurations, as `config.load` takes them.
    budgets: FLOPs of a run.
    sizes: networks, `WIDTHxLAYERS`; heads are as wide as the configuration's.
    seeds: of each.
    least_steps: a run with fewer is left out.
    change: makes of each configuration the one that is meant.
    devices: what they are trained on; by default all.

  Raises:
    ValueError: a size is none, a budget is not above 0, heads do not divide a
      width, a name comes twice, or no run is left.
    FileNotFoundError: there is no such configuration.
  """
  if not (names and budgets and sizes and seeds):
    raise ValueError("a grid needs a config, a budget, a size and a seed")
  if min(budgets) <= 0:
    raise ValueError(f"budgets are FLOPs above 0, not {min(budgets):g}")
  for given in (names, budgets, sizes, seeds):
    twice = [one for one in given if list(given).count(one) > 1]
    if twice:
      raise ValueError(f"{twice[0]!r} is given twice: name each once")
  found, left_out = [], []
  for name in names:
    label = name.replace(".py", "").split("/")[-1]
    base = change(configs.load(name))
    for size in sizes:
      sized = _sized(base, size)
      parameters, flops = _counts(sized, devices)
      for budget in budgets:
        steps = round(budget / flops)
        if steps < least_steps:
          left_out.append(
            f"{label} {size} at {budget:g} FLOPs: {steps} steps, fewer than "
            f"{least_steps}"
          )
          continue
        for seed in seeds:
          found.append(
            Cell(
              config=label,
              size=size,
              budget=budget,
              seed=seed,
              resolved=_budgeted(sized, steps, seed),
              parameters=parameters,
              flops=flops,
            )
          )
  if not found:
    raise ValueError(
      f"no run of the grid has {least_steps} steps: larger --flops, smaller "
      "--sizes or fewer --least_steps"
    )
  return sorted(found, key=lambda cell: cell.budget), left_out


def _sized(base: ConfigDict, size: str) -> ConfigDict:
  """Returns a configuration with a network of another size."""
  match = _SIZE.fullmatch(size)
  if match is None:
    raise ValueError(f"a size is WIDTHxLAYERS, such as 128x4, not {size!r}")
  width, layers = map(int, match.groups())
  resolved = ConfigDict(base.to_dict())
  model = resolved.model
  head = model.get("head_dim") or model.width // model.heads
  if not width or not layers or width % head:
    raise ValueError(
      f"size {size}: the width must be a multiple of {head}, which is a head's, "
      "and there must be a layer"
    )
  if model.get("mlp_dim"):
    model.mlp_dim = max(1, round(model.mlp_dim * width / model.width))
  if model.get("unroll", 1) > 1:
    model.unroll = layers
  model.width, model.layers, model.heads = width, layers, width // head
  return resolved


def _budgeted(sized: ConfigDict, steps: int, seed: int) -> ConfigDict:
  """Returns a configuration of so many steps, evaluated at the end alone."""
  resolved = ConfigDict(sized.to_dict())
  resolved.training.steps, resolved.training.seed = steps, seed
  warmup = resolved.optimizer.warmup_steps
  resolved.optimizer.warmup_steps = min(warmup, int(_WARMUP * steps))
  resolved.evaluation.every_steps = 0
  resolved.evaluation.sample_every = 0
  resolved.checkpoint.every_steps = max(1, -(-steps // 4))
  return resolved


def _counts(resolved: ConfigDict, devices) -> tuple[int, int]:
  """Returns parameters, and model FLOPs of a train step; compiles nothing."""
  with tempfile.TemporaryDirectory() as directory:
    run = timing.opened(resolved, directory, devices)
    leaves = jax.tree.leaves(run.program.abstract.params)
    return sum(leaf.size for leaf in leaves), run.model_flops()


def estimate(
  grid: Sequence[Cell], *, devices: Sequence[jax.Device] | None = None
) -> dict[str, Any]:
  """Returns what runs will take, by timing the smallest and the largest network.

  Of each configuration; the rate of those between lies between, in the logarithm
  of their FLOPs. Evaluation is not in it.

  Args:
    grid: the runs.
    devices: what they are trained on; by default all.

  Returns:
    `seconds`, and `peak_bytes` of the largest step.

  Raises:
    ValueError: a step does not fit into this machine's memory.
  """
  seconds, peak = 0.0, 0
  for config in dict.fromkeys(cell.config for cell in grid):
    mine = [cell for cell in grid if cell.config == config]
    ends = min(mine, key=_flops), max(mine, key=_flops)
    timed = {
      cell.flops: timing.timed(cell.resolved, cell.place, devices)
      for cell in ends
    }
    x = np.log([cell.flops for cell in ends])
    rates = [np.log(c.flops / timed[c.flops]["seconds"]) for c in ends]
    compiling = np.mean([t["compile_seconds"] for t in timed.values()])
    for cell in mine:
      rate = np.exp(np.interp(np.log(cell.flops), x, rates))
      seconds += cell.steps * cell.flops / rate + compiling
    peak = max(peak, *(t["peak_bytes"] for t in timed.values()))
  return {"seconds": float(seconds), "peak_bytes": peak}


def _flops(cell: Cell) -> int:
  return cell.flops

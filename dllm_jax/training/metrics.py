"""Where metrics go: a JSON-lines file, TensorBoard, and W&B where asked for.

Only the first process writes. The file survives restarts: lines of steps that a
resumed run will take again are dropped.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import json
import os
from typing import Any

import numpy as np

from dllm_jax.core import check, paths
from dllm_jax.core.files import keep_lines, Lines, read_lines
from dllm_jax.core.paths import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Logging:
  """What to report while training.

  Attributes:
    every_steps: steps between logged metrics.
    tensorboard: whether to write TensorBoard events to `workdir/tensorboard`.
    wandb: a Weights & Biases project, or "" for none; the package `wandb` must be
      installed.
    progress: whether to draw a progress bar on standard error.
  """

  every_steps: int = 10
  tensorboard: bool = True
  wandb: str = ""
  progress: bool = True

  def __post_init__(self):
    check.at_least(self, 1, "every_steps", prefix="logging.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spent:
  """What earlier starts of a run have used.

  Attributes:
    wall_seconds: time that they trained, the steps included that were lost.
    useful_seconds: time in the steps that were kept.
  """

  wall_seconds: float = 0.0
  useful_seconds: float = 0.0


class MetricWriter:
  """Writes scalars and texts by step.

  Attributes:
    spent: what earlier starts of the run have used.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    logging: Logging,
    *,
    resumed_step: int = 0,
    config: dict[str, Any] | None = None,
    active: bool = True,
  ):
    """Opens the run's files for appending.

    Args:
      workdir: the run's directory.
      logging: what to write.
      resumed_step: lines of later steps are dropped from `metrics.jsonl`.
      config: the resolved configuration, for W&B.
      active: False on all processes but the first.

    Raises:
      ValueError: W&B was asked for and is not installed.
    """
    self._file = self._wandb = None
    self._tensorboard: tuple[Path, int] | None = None
    self.spent = Spent()
    if not active:
      return
    path = paths.place(workdir) / "metrics.jsonl"
    before = _last(path, "wall_seconds")
    keep_lines(path, lambda line: _is_up_to(line, resumed_step))
    self.spent = Spent(
      wall_seconds=before, useful_seconds=_last(path, "useful_seconds")
    )
    self._file = Lines(path)
    if logging.tensorboard:
      self._tensorboard = (path.parent / "tensorboard", resumed_step + 1)
    if logging.wandb:
      try:
        import wandb  # pylint: disable=g-import-not-at-top
      except ImportError as error:
        raise ValueError(
          "logging.wandb is set and wandb is not installed; pip install wandb "
          "or set logging.wandb to ''"
        ) from error
      self._wandb = wandb.init(
        project=logging.wandb,
        dir=None if paths.in_bucket(path) else str(path.parent),
        config=config,
        resume="allow",
      )

  def write(self, step: int, values: dict[str, Any]) -> None:
    """Writes one line, and each scalar to the other sinks.

    Args:
      step: the step that the values belong to.
      values: numbers and texts by name.
    """
    if self._file is None:
      return
    values = {k: _plain(v) for k, v in values.items()}
    self._file.add(json.dumps({"step": step, **values}) + "\n")
    if self._tensorboard is not None:
      for name, value in values.items():
        if isinstance(value, str):
          self._events.add_text(name, f"```\n{value}\n```", step)
        elif isinstance(value, (int, float)):
          self._events.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log(values, step=step)

  @functools.cached_property
  def _events(self) -> Any:
    """TensorBoard's events, opened by the first line.

    Where clients of buckets are installed, importing it takes as long as jax:
    the first step does not wait for it.
    """
    from tensorboardX import SummaryWriter  # noqa: PLC0415

    folder, first = self._tensorboard
    return SummaryWriter(str(folder), purge_step=first)

  def flush(self) -> None:
    """Returns when all lines are kept: a checkpoint must not come before them."""
    if self._file is not None:
      self._file.flush()

  def close(self) -> None:
    """Flushes and closes everything."""
    for sink in (self._file, self.__dict__.get("_events")):
      if sink is not None:
        sink.close()
    if self._wandb is not None:
      self._wandb.finish()


def latest(workdir: str | os.PathLike, prefixes: Sequence[str]) -> dict:
  """Returns the newest logged value of each metric whose name has a prefix."""
  found: dict[str, Any] = {}
  for values in lines(paths.place(workdir) / "metrics.jsonl"):
    found |= {k: v for k, v in values.items() if k.startswith(tuple(prefixes))}
  return found


def _last(path: Path, name: str) -> float:
  return next((v[name] for v in lines(path)[::-1] if name in v), 0.0)


def lines(path: Path) -> list[dict[str, Any]]:
  """Returns the whole lines of a metrics file; a kill may cut the last short."""
  found = []
  for line in read_lines(path):
    with contextlib.suppress(json.JSONDecodeError):
      found.append(json.loads(line))
  return found


def _plain(value: Any) -> Any:
  if isinstance(value, (str, int, list)):
    return value
  return float(np.asarray(value))


def _is_up_to(line: str, step: int) -> bool:
  """Whether a line is whole and of a step that is not taken again."""
  try:
    return json.loads(line)["step"] <= step
  except json.JSONDecodeError:
    return False

"""Which tasks there are: the files of `tasks/`, and entry points.

A task is found by the name of its module, which holds it as `TASK`. A package of
your own adds one by an entry point of the group `dllm_jax.tasks`.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import importlib
import importlib.metadata
import pkgutil
from typing import Any

from dllm_jax.core.paths import Path
from dllm_jax.evaluation.tasks.partial_results import Ledger
from dllm_jax.run.run import Run
from dllm_jax.sampling.presets import SamplerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
  """What a task is given.

  Attributes:
    workdir: the working directory, where partial results are kept.
    run: the run in it; None for a task that opens none.
    sampler: how to sample, flags of the command line included.
    use_ema: whether to use averaged parameters where the run has them.
    progress: whether to draw bars on standard error.
  """

  workdir: Path
  run: Run | None
  sampler: SamplerConfig = SamplerConfig()
  use_ema: bool = True
  progress: bool = False

  def ledger(self, task: str, protocol: Mapping[str, Any]) -> Ledger:
    """Returns the partial results of a task under a protocol.

    The protocol is completed by what every figure depends on: the checkpoint
    and which of its parameters.
    """
    return Ledger(
      self.workdir / "evaluation" / f"{task}.jsonl",
      self.protocol(protocol),
      progress=self.progress,
    )

  def protocol(self, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a protocol with the checkpoint that it is about."""
    if self.run is None:
      return dict(fields)
    step = int(self.run.state.step)
    return {**fields, "step": step, "use_ema": self.use_ema}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """One task of `dllm evaluate`.

  Attributes:
    summary: one line for the list of tasks.
    run: does it: `(setting, options) -> ` the last line's JSON object, which
      holds its `protocol`.
    text: the object as lines for people.
    options: a frozen dataclass whose fields are the task's flags; a field's
      metadata holds its `help`.
    opens: whether it needs a run in the working directory; else the directory
      is only where it writes.
  """

  summary: str
  run: Callable[[Setting, Any], Mapping[str, Any]]
  text: Callable[[Mapping[str, Any]], str]
  options: type
  opens: bool = True


def option(default: Any, text: str, *, path: bool = False) -> Any:
  """Returns a field of a task's options, with its help.

  Args:
    default: of the field.
    text: the help of its flag.
    path: whether it may name a place on disk, so that `~` means the home
      directory.
  """
  return dataclasses.field(
    default=default, metadata={"help": text, "path": path}
  )


@functools.cache
def tasks() -> dict[str, str]:
  """Returns the modules of tasks by name."""
  folder = Path(__file__).parent
  found = {
    m.name: f"dllm_jax.evaluation.tasks.{m.name}"
    for m in pkgutil.iter_modules([str(folder)])
    if m.name not in ("partial_results", "registry")
  }
  for entry in importlib.metadata.entry_points(group="dllm_jax.tasks"):
    found.setdefault(entry.name, entry.value)
  return dict(sorted(found.items()))


def task(name: str) -> Task:
  """Returns a task by its name.

  Raises:
    KeyError: there is no such task.
  """
  known = tasks()
  if name not in known:
    raise KeyError(f"unknown task {name!r}; legal: {', '.join(known)}")
  return importlib.import_module(known[name]).TASK

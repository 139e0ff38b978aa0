"""Several configurations on the same data in the same order, side by side.

Each has a working directory of its own under the output directory and is trained
to the same number of tokens; its bound on the same held-out text is read along
the way and, on all of it, at the end. A second start continues.
"""

from collections.abc import Callable, Mapping, Sequence
import json
import math
import os
from typing import Any

import jax
from ml_collections import ConfigDict

from dllm_jax.config import config as configs
from dllm_jax.core import paths
from dllm_jax.core.files import write_whole
from dllm_jax.core.paths import Path
from dllm_jax.plots import line_plot
from dllm_jax.run.run import Run
from dllm_jax.training import metrics

# What makes the data and its order.
_SAME = (
  "data",
  "training.batch_size",
  "training.batch_tokens",
  "training.seed",
)


def prepare(
  names: Sequence[str],
  budget_tokens: int,
  points: int,
  *,
  change: Callable[[ConfigDict], ConfigDict] = lambda resolved: resolved,
) -> dict[str, ConfigDict]:
  """Returns the configurations by label, each set to the budget.

  Args:
    names: configs as `config.load` takes them.
    budget_tokens: tokens that each is trained on, up to a whole batch.
    points: evaluations along the way, the last one included.
    change: makes of each configuration the one that is meant.

  Raises:
    ValueError: two would not see the same data in the same order, a name comes
      twice, or the budget is below one batch.
    FileNotFoundError: there is no such config.
  """
  if not names:
    raise ValueError("nothing to compare: give --configs=A,B,...")
  if points < 1:
    raise ValueError(f"points must be at least 1, not {points}")
  found: dict[str, ConfigDict] = {}
  for name in names:
    label = Path(name).stem if name.endswith(".py") else name
    label = label.replace(".py", "").split("/")[-1]
    if label in found:
      raise ValueError(f"config {label!r} is given twice; name each once")
    found[label] = change(configs.load(name))
  first_label, first = next(iter(found.items()))
  for label, resolved in found.items():
    for path in _SAME:
      mine, other = _at(resolved, path), _at(first, path)
      if mine != other:
        raise ValueError(
          f"config.{path} of {label} differs from that of {first_label}: "
          "configs that are compared must read the same data in the same order"
        )
    _set_budget(resolved, budget_tokens, points)
  return found


def _at(resolved: ConfigDict, path: str) -> Any:
  node = json.loads(resolved.to_json())
  for part in path.split("."):
    node = node[part]
  return node


def _set_budget(resolved: ConfigDict, budget_tokens: int, points: int) -> None:
  training = configs.parse(resolved).training
  batch = training.batch_size * resolved.data.length
  if budget_tokens < batch:
    raise ValueError(
      f"budget_tokens {budget_tokens} is less than one batch of {batch} tokens"
    )
  steps = -(-budget_tokens // batch)
  every = -(-steps // points)
  resolved.training.steps = steps
  resolved.evaluation.every_steps = every
  resolved.evaluation.sample_every = 0
  resolved.checkpoint.every_steps = every


def compare(
  prepared: dict[str, ConfigDict],
  output: str | os.PathLike,
  *,
  devices: Sequence[jax.Device] | None = None,
) -> dict[str, Any]:
  """Trains and evaluates each configuration; writes a table and a plot.

  Args:
    prepared: what `prepare` returned.
    output: the directory of all of it.
    devices: the devices to use; by default all.

  Returns:
    `rows`, best first, `interrupted`, and the paths `table` and `plot`.
  """
  output = paths.place(output)
  rows, stopped = [], False
  for label, resolved in prepared.items():
    workdir = output / label.replace(":", "_")
    run = Run.create(resolved, workdir, devices=devices)
    print(f"{label}: {run.describe()}", flush=True)
    summary = run.train()
    if summary["interrupted"]:
      stopped = True
      break
    row = _row(label, run, summary)
    rows.append(row)
    print(
      f"{label}: {row['bits_per_char']:.4f} +- {row['standard_error']:.4f} "
      "bits per character",
      flush=True,
    )
  rows.sort(key=lambda row: row["bits_per_char"])
  result: dict[str, Any] = {"rows": rows, "interrupted": stopped}
  if rows and jax.process_index() == 0:
    result |= write(rows, output)
  return result


def _row(label: str, run: Run, summary: dict[str, Any]) -> dict[str, Any]:
  """Returns a finished run's figures, evaluated on all held-out text."""
  path = run.workdir / "comparison.json"
  step = summary["step"]
  if path.exists():
    row = json.loads(path.read_text(encoding="utf-8"))
    if row["step"] == step:
      return row
  figures = run.evaluate()
  batch = run.config.training.batch_size * run.config.data.length
  per_char = figures["bits_per_char"] / figures["bits_per_token"]
  shapes = jax.tree.leaves(run.program.abstract.params)
  row = {
    "config": label,
    "objective": run.resolved.objective.name,
    "bits_per_char": figures["bits_per_char"],
    "standard_error": figures["standard_error"] * per_char,
    "bits_per_token": figures["bits_per_token"],
    "parameters": sum(leaf.size for leaf in shapes),
    "step": step,
    "tokens": step * batch,
    "tokens_per_second": summary.get("tokens_per_second"),
    "curve": held_out(metrics.lines(run.workdir / "metrics.jsonl"), batch),
  }
  if jax.process_index() == 0:
    write_whole(path, json.dumps(row, indent=2) + "\n")
  return row


def held_out(
  lines: Sequence[Mapping[str, Any]], batch: int
) -> list[tuple[float, float, float]]:
  """Returns (tokens, bits per character, standard error) along a run.

  Args:
    lines: its metrics.
    batch: tokens of a batch.
  """
  found = []
  for values in lines:
    if "eval_bits_per_char" in values:
      bits = values["eval_bits_per_char"]
      error = values["eval_standard_error"]
      error *= bits / values["eval_bits_per_token"]
      found.append((values["step"] * batch, bits, error))
  return found


def table(rows: Sequence[dict[str, Any]]) -> str:
  """Returns the rows as Markdown."""
  lines = [
    "| config | objective | bits per character | standard error | parameters "
    "| tokens |",
    "|---|---|---|---|---|---|",
  ]
  for row in rows:
    lines.append(
      f"| {row['config']} | {row['objective']} | {row['bits_per_char']:.4f} "
      f"| {row['standard_error']:.4f} | {row['parameters']:,} "
      f"| {row['tokens']:,} |"
    )
  return "\n".join(lines) + "\n"


def write(rows: Sequence[dict[str, Any]], output: Path) -> dict[str, str]:
  """Writes comparison.md, comparison.json and comparison.svg."""
  text = json.dumps({"rows": list(rows)}, indent=2) + "\n"
  (output / "comparison.json").write_text(text, encoding="utf-8")
  (output / "comparison.md").write_text(table(rows), encoding="utf-8")
  finite = {
    row["config"]: [tuple(p) for p in row["curve"]]
    for row in rows
    if any(math.isfinite(p[1]) for p in row["curve"])
  }
  plot = line_plot(
    finite, x_label="tokens seen", y_label="bits per character (held out)"
  )
  (output / "comparison.svg").write_text(plot, encoding="utf-8")
  return {
    "table": str(output / "comparison.md"),
    "plot": str(output / "comparison.svg"),
  }

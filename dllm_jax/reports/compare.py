"""Several configurations on the same data in the same order, side by side.

Each is trained to the same number of tokens, once for each seed, in a working
directory of its own under the output directory; its bound on the same held-out
text is read along the way and, on all of it, at the end. A second start continues.

Of several seeds the mean counts, and all are paired: those of one seed read the
same data in the same order.
"""

from collections.abc import Callable, Mapping, Sequence
import itertools
import json
import math
import os
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from dllm_jax.config import config as configs
from dllm_jax.core import paths
from dllm_jax.core.files import write_whole
from dllm_jax.core.paths import Path
from dllm_jax.evaluation.likelihood.documents import mean
from dllm_jax.plots import line_plot
from dllm_jax.run import timing
from dllm_jax.run.run import Run
from dllm_jax.training import metrics

# What makes the data and its order.
_SAME = (
  "data",
  "training.batch_size",
  "training.batch_tokens",
  "training.seed",
)


_FIGURES = "comparison.json"


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


def left(
  prepared: Mapping[str, ConfigDict],
  output: str | os.PathLike,
  *,
  seeds: Sequence[int] = (),
) -> int:
  """Returns how many runs have no figure yet.

  Args:
    prepared: what `prepare` returned.
    output: the directory of all of it.
    seeds: as of `compare`.
  """
  output = paths.place(output)
  return sum(
    not (output / place / _FIGURES).exists()
    for _, place, _ in _runs(prepared, seeds)
  )


def _runs(prepared, seeds) -> list[tuple[str, str, ConfigDict]]:
  """Returns the label, the place under the output and the fields of each run."""
  if len(set(seeds)) < len(seeds):
    raise ValueError(f"seeds {list(seeds)}: name each once")
  found = []
  for seed in seeds or (None,):
    for label, resolved in prepared.items():
      resolved = ConfigDict(resolved.to_dict())
      if seed is not None:
        resolved.training.seed = seed
      own = f"{label.replace(':', '_')}/seed{resolved.training.seed}"
      found.append((label, own, resolved))
  return found


def estimate(
  prepared: Mapping[str, ConfigDict],
  output: str | os.PathLike,
  *,
  seeds: Sequence[int] = (),
  devices: Sequence[jax.Device] | None = None,
) -> float:
  """Returns the seconds that what is left to train takes, evaluation aside.

  By timing some steps of each configuration, which are thrown away.

  Args:
    prepared: what `prepare` returned.
    output: the directory of all of it.
    seeds: as of `compare`.
    devices: the devices to use; by default all.

  Raises:
    ValueError: a step does not fit into this machine's memory.
  """
  output, found, seconds = paths.place(output), {}, 0.0
  for label, place, resolved in _runs(prepared, seeds):
    if (output / place / _FIGURES).exists():
      continue
    if label not in found:
      found[label] = timing.timed(resolved, label, devices)
    one = found[label]
    seconds += resolved.training.steps * one["seconds"] + one["compile_seconds"]
  return seconds


def compare(
  prepared: Mapping[str, ConfigDict],
  output: str | os.PathLike,
  *,
  seeds: Sequence[int] = (),
  devices: Sequence[jax.Device] | None = None,
) -> dict[str, Any]:
  """Trains and evaluates each configuration; writes a table and a plot.

  Args:
    prepared: what `prepare` returned.
    output: the directory of all of it.
    seeds: of parameters, corruption and the data's order; by default that of the
      configurations. All are run with the first one before the second.
    devices: the devices to use; by default all.

  Returns:
    `rows`, best first, `interrupted`, and the paths `table` and `plot`.

  Raises:
    ValueError: a seed comes twice.
  """
  output = paths.place(output)
  own: dict[str, list[dict]] = {label: [] for label in prepared}
  stopped = False
  for label, place, resolved in _runs(prepared, seeds):
    run = Run.create(resolved, output / place, devices=devices)
    print(f"{place}: {run.describe()}", flush=True)
    summary = run.train()
    if summary["interrupted"]:
      stopped = True
      break
    row = _row(label, place, run, summary)
    own[label].append(row)
    print(
      f"{place}: {row['bits_per_char']:.4f} +- {row['standard_error']:.4f} "
      "bits per character",
      flush=True,
    )
  rows = ranked([merged(found) for found in own.values() if found])
  result: dict[str, Any] = {"rows": rows, "interrupted": stopped}
  if rows and jax.process_index() == 0:
    result |= write(rows, output)
  return result


def _row(
  label: str, place: str, run: Run, summary: dict[str, Any]
) -> dict[str, Any]:
  """Returns a finished run's figures, evaluated on all held-out text."""
  path = run.workdir / _FIGURES
  step = summary["step"]
  if path.exists():
    row = json.loads(path.read_text(encoding="utf-8"))
    if row["step"] == step:
      return row
  figures = run.evaluate()
  length = run.config.data.length
  batch = run.config.training.batch_size * length
  per_char = figures["bits_per_char"] / figures["bits_per_token"]
  shapes = jax.tree.leaves(run.program.abstract.params)
  text = run.corpus.train
  row = {
    "config": label,
    "place": place,
    "objective": run.resolved.objective.name,
    "seed": run.config.training.seed,
    "bits_per_char": figures["bits_per_char"],
    "standard_error": figures["standard_error"] * per_char,
    "bits_per_token": figures["bits_per_token"],
    "parameters": sum(leaf.size for leaf in shapes),
    "step": step,
    "tokens": step * batch,
    # Streams are as long as they are.
    "epoch": len(text) * length if hasattr(text, "__len__") else None,
    "tokens_per_second": summary.get("tokens_per_second"),
    "curve": held_out(metrics.lines(run.workdir / "metrics.jsonl"), batch),
  }
  if jax.process_index() == 0:
    write_whole(path, json.dumps(row, indent=2) + "\n")
  return row


def merged(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns one row of those of a configuration's seeds.

  Means, with the standard error of the mean over seeds, s / sqrt(n): the
  evaluation's own error is part of it. Of one seed it is the evaluation's alone.
  `interval` holds the 95 % of it, by Student's t with n - 1 degrees of freedom, of
  one seed by the normal distribution.

  Args:
    rows: a row of each seed, in their order.
  """
  bits = [row["bits_per_char"] for row in rows]
  middle, error, half = mean(bits)
  if len(rows) == 1:
    error = rows[0]["standard_error"]
    half = 1.96 * error
  curves = np.asarray([row["curve"] for row in rows]).reshape(len(rows), -1, 3)
  curve = curves.mean(0)
  if len(rows) > 1:
    curve[:, 2] = curves[:, :, 1].std(0, ddof=1) / math.sqrt(len(rows))
  return {
    **rows[0],
    "bits_per_char": middle,
    "standard_error": error,
    "interval": [middle - half, middle + half],
    "bits_per_token": float(np.mean([row["bits_per_token"] for row in rows])),
    "seeds": {str(row["seed"]): row["bits_per_char"] for row in rows},
    "places": [row["place"] for row in rows],  # below the output
    "curve": curve.tolist(),
  }


def ranked(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns rows, best first, with `behind`: how far each is behind the one before.

  Mean and half the 95 % interval of the differences of one seed each, where rows
  have several seeds and the same.
  """
  rows = sorted(rows, key=lambda row: row["bits_per_char"])
  for above, row in itertools.pairwise(rows):
    seeds = row["seeds"].keys() & above["seeds"].keys()
    if len(seeds) > 1 and seeds == row["seeds"].keys():
      gaps = [row["seeds"][s] - above["seeds"][s] for s in sorted(seeds)]
      middle, _, half = mean(gaps)
      row["behind"] = [middle, half]
  return rows


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
    "| config | objective | bits per character | 95 % interval | behind the row "
    "above | least on the way, after epochs | parameters | tokens |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    low, high = row["interval"]
    behind = "{:.4f} ± {:.4f}".format(*row["behind"]) if "behind" in row else ""
    lines.append(
      f"| {row['config']} | {row['objective']} | {row['bits_per_char']:.4f} "
      f"| {low:.4f} to {high:.4f} | {behind} | {_least(row)} "
      f"| {row['parameters']:,} | {row['tokens']:,} |"
    )
  counts = sorted({len(row["seeds"]) for row in rows})
  over = (
    "of the evaluation alone, as each ran with one seed"
    if counts == [1]
    else f"over {' or '.join(map(str, counts))} seeds, which are paired"
  )
  return "\n".join([*lines, "", f"Intervals are {over}."]) + "\n"


def _least(row: Mapping[str, Any]) -> str:
  """Returns the least bound on the way, as a table has it."""
  points = [p for p in row["curve"] if math.isfinite(p[1])]
  if not points or not row["epoch"]:
    return ""
  tokens, bits, _ = min(points, key=lambda point: point[1])
  return f"{bits:.4f}, {tokens / row['epoch']:.3g}"


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

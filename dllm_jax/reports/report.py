"""One HTML page that compares runs: losses, likelihoods, samples, speed.

The page is one file without any request to a network. What it says of a run is
read from its metrics or measured on its newest checkpoint, and kept in the run's
directory, so that an interrupted report continues.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import time
from typing import Any

import jax
import numpy as np

from dllm_jax.core import check, paths
from dllm_jax.core.files import write_whole
from dllm_jax.core.paths import Path
from dllm_jax.evaluation.benchmarks import recall
from dllm_jax.evaluation.tasks.registry import Setting
from dllm_jax.plots import bar_plot, line_plot
from dllm_jax.posttraining.reinforcement import record
from dllm_jax.reports.compare import held_out
from dllm_jax.run.run import Run
from dllm_jax.training import metrics

# What a run that rewards train logs of its rollouts, by the label of a plot.
_EARNED = {
  "reward": "reward of a rollout",
  "eval_reward": "reward of held-out problems",
  "answer_tokens": "tokens of an answer",
  "calls_per_token": "network calls a token",
  "kl": "nats",
  "clip_fraction": "share of tokens that are clipped",
  "entropy": "nats of a drawn token",
}
_POINTS = 150  # of a loss curve, each the mean of what it stands for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Content:
  """What a page holds besides losses.

  Attributes:
    batches: held-out batches that the likelihood reads; 0 for all.
    num_samples: texts of each run; 0 for none.
    rounds: timed rounds of the sampler.
    use_ema: whether to use averaged parameters.
  """

  batches: int = 0
  num_samples: int = 2
  rounds: int = 5
  use_ema: bool = True

  def __post_init__(self):
    if self.batches < 0 or self.num_samples < 0:
      raise ValueError(
        "batches and num_samples must be at least 0, not "
        f"{self.batches} and {self.num_samples}"
      )
    check.at_least(self, 2, "rounds")


def labels(workdirs: Sequence[str]) -> dict[str, Path]:
  """Returns a short name for each directory.

  Raises:
    ValueError: there is none, or one comes twice.
  """
  folders = [paths.place(w) for w in workdirs]
  if not folders:
    raise ValueError("nothing to report: give --workdirs=A,B,...")
  if len(set(folders)) < len(folders):
    raise ValueError("a run is given twice in --workdirs; name each once")
  names = [p.name for p in folders]
  whole = len(set(names)) < len(names)
  return {str(p) if whole else p.name: p for p in folders}


def report(
  workdirs: Sequence[str],
  output: str | os.PathLike,
  content: Content = Content(),
  *,
  progress: bool = False,
) -> dict[str, Any]:
  """Writes the page; returns `page` and the figures of each run.

  Raises:
    FileNotFoundError: a directory holds no run, or no checkpoint.
    ValueError: nothing to report, or a run twice.
  """
  found = labels(workdirs)
  runs = {name: Run.open(path) for name, path in found.items()}
  rows = []
  for name, run in runs.items():
    rows.append({"run": name} | figures(run, content, progress=progress))
    print(f"{name}: {rows[-1]['description']}", flush=True)
  if jax.process_index() == 0:
    output = paths.place(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, page(rows))
  shown = [{k: v for k, v in row.items() if k != "curves"} for row in rows]
  return {"page": str(output), "rows": shown}


def figures(
  run: Run, content: Content, *, progress: bool = False
) -> dict[str, Any]:
  """Returns what a page says of a run, as JSON can hold it."""
  setting = Setting(
    workdir=run.workdir, run=run, use_ema=content.use_ema, progress=progress
  )
  ledger = setting.ledger("report", dataclasses.asdict(content))
  measure = {
    "likelihood": lambda: _likelihood(run, content),
    "samples": lambda: _samples(run, content),
  }
  values = ledger.each(
    list(measure), lambda names: [measure[n]() for n in names], unit="figure"
  )
  batch = run.config.training.batch_size * run.config.data.length
  lines = metrics.lines(run.workdir / "metrics.jsonl")
  speeds = [x["tokens_per_second"] for x in lines if "tokens_per_second" in x]
  return {
    "description": run.describe(),
    "step": int(run.state.step),
    "tokens": int(run.state.step) * batch,
    "training_tokens_per_second": float(np.median(speeds)) if speeds else None,
    "curves": {
      "loss": _curve(lines, "loss_nats_per_token", batch),
      "held_out": held_out(lines, batch),
      **{name: _curve(lines, name, 1) for name in _EARNED},
    },
    **dict(zip(measure, values, strict=True)),
    "protocol": ledger.protocol,
  }


def _curve(
  lines: Sequence[Mapping[str, Any]], field: str, batch: int
) -> list[tuple[float, float, float]]:
  """Returns (tokens, mean, 0) of a metric in at most `_POINTS` pieces."""
  points = [(x["step"] * batch, x[field]) for x in lines if field in x]
  pieces = np.array_split(np.asarray(points), min(len(points), _POINTS) or 1)
  return [(*map(float, p.mean(axis=0)), 0.0) for p in pieces if len(p)]


def _likelihood(run: Run, content: Content) -> dict[str, Any] | None:
  if run.corpus.held_out is None:
    return None
  found = run.evaluate(use_ema=content.use_ema, limit=content.batches or None)
  scale = found["bits_per_char"] / found["bits_per_token"]
  error = found["standard_error"] * scale
  return dict(found) | {"bits_per_char_error": error}


def _samples(run: Run, content: Content) -> dict[str, Any] | None:
  if not content.num_samples:
    return None
  once = lambda seed: run.sample(
    num_samples=content.num_samples, seed=seed, use_ema=content.use_ema
  )
  first = once(0)
  seconds = [once(seed).seconds for seed in range(1, content.rounds + 1)]
  speeds = first.new_tokens / np.asarray(seconds)
  calls = jax.device_get(first.generation.function_evaluations)
  return {
    "texts": record.newest(run.workdir, content.num_samples) or first.texts,
    "tokens_per_second": float(np.median(speeds)),
    "tokens_per_second_error": recall.standard_error(speeds),
    "function_evaluations": int(np.max(calls)),
    "new_tokens": first.new_tokens,
    "sampler": run.config.sampler.preset,
  }


def page(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns the page of some runs' figures."""
  import jinja2  # Only pages need it.

  environment = jinja2.Environment(
    loader=jinja2.PackageLoader("dllm_jax.reports", "."),
    autoescape=True,
    trim_blocks=True,
    undefined=jinja2.StrictUndefined,
  )
  return environment.get_template("report.html").render(
    rows=rows,
    made=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    jax=jax.__version__,
    plots=[
      *_losses(rows),
      *_earned(rows),
      *_likelihoods(rows),
      *_speeds(rows),
    ],
    with_error=_with_error,
    indented=lambda value: json.dumps(value, indent=1),
  )


def _with_error(
  values: Mapping[str, Any] | None, name: str, error: str, digits: int
) -> str:
  if not values:
    return ""
  value = f"{values[name]:,.{digits}f}"
  spread = values[error]
  return f"{value} \u00b1 {spread:,.{digits}f}" if spread else f"{value}, exact"


_Plot = tuple[str, str, str]  # title, text, SVG


def _losses(rows: Sequence[Mapping[str, Any]]) -> list[_Plot]:
  parts = []
  for field, title, label, text in (
    (
      "loss",
      "Training loss",
      "nats per token",
      "Each objective's own loss, which is no likelihood where its weights "
      "are others: compare curves of one objective.",
    ),
    (
      "held_out",
      "Held-out text while training",
      "bits per character",
      "The bound, exact for autoregressive models; bars are one standard "
      "error of its Monte-Carlo estimate.",
    ),
  ):
    curves = {row["run"]: row["curves"][field] for row in rows}
    curves = {name: curve for name, curve in curves.items() if curve}
    if curves:
      svg = line_plot(curves, x_label="tokens seen", y_label=label)
      parts.append((title, text, svg))
  return parts


def _earned(rows: Sequence[Mapping[str, Any]]) -> list[_Plot]:
  """Returns the plots of runs that rewards train."""
  parts = []
  for field, label in _EARNED.items():
    curves = {row["run"]: row["curves"].get(field) for row in rows}
    curves = {name: curve for name, curve in curves.items() if curve}
    if curves:
      svg = line_plot(curves, x_label="updates", y_label=label)
      title = field.replace("_", " ").replace("eval", "held-out").capitalize()
      parts.append((title, "Reinforcement learning.", svg))
  return parts


def _likelihoods(rows: Sequence[Mapping[str, Any]]) -> list[_Plot]:
  bars = {
    row["run"]: {
      "bits per character": (
        row["likelihood"]["bits_per_char"],
        row["likelihood"]["bits_per_char_error"],
      )
    }
    for row in rows
    if row["likelihood"]
  }
  lacking = [row["run"] for row in rows if not row["likelihood"]]
  text = "The newest checkpoint, on held-out text; bars are one standard error."
  if lacking:
    text += f" Nothing is held out in {', '.join(lacking)}."
  svg = bar_plot(bars, y_label="bits per character") if bars else ""
  return [("Likelihood", text, svg)]


def _speeds(rows: Sequence[Mapping[str, Any]]) -> list[_Plot]:
  bars = {
    row["run"]: {
      "sampling": (
        row["samples"]["tokens_per_second"],
        row["samples"]["tokens_per_second_error"],
      )
    }
    for row in rows
    if row["samples"]
  }
  if not bars:
    return []
  text = (
    "Generated tokens per second of a small batch, compilation apart, the "
    "median of the rounds; bars are one standard error. Each run samples as it "
    "is configured."
  )
  return [("Speed", text, bar_plot(bars, y_label="tokens per second"))]

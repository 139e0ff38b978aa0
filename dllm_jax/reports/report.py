"""One HTML page that compares runs: losses, likelihoods, samples, speed.

The page is one file without any request to a network. What it says of a run is
read from its metrics or measured on its newest checkpoint, and kept in the run's
directory, so that an interrupted report continues.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from html import escape
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np

from dllm_jax.evaluation.benchmarks import recall
from dllm_jax.evaluation.tasks.registry import Setting
from dllm_jax.plots import bar_plot, line_plot
from dllm_jax.run.run import Run
from dllm_jax.training import metrics

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
    if self.rounds < 2:
      raise ValueError(f"rounds must be at least 2, not {self.rounds}")


def labels(workdirs: Sequence[str]) -> dict[str, pathlib.Path]:
  """Returns a short name for each directory.

  Raises:
    ValueError: there is none, or one comes twice.
  """
  paths = [pathlib.Path(w) for w in workdirs]
  if not paths:
    raise ValueError("nothing to report: give --workdirs=A,B,...")
  if len(set(paths)) < len(paths):
    raise ValueError("a run is given twice in --workdirs; name each once")
  names = [p.name for p in paths]
  whole = len(set(names)) < len(names)
  return {str(p) if whole else p.name: p for p in paths}


def report(
  workdirs: Sequence[str],
  output: str | pathlib.Path,
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
    output = pathlib.Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(".tmp")
    temporary.write_text(page(rows), encoding="utf-8")
    temporary.replace(output)
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
      "held_out": _held_out(lines, batch),
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


def _held_out(
  lines: Sequence[Mapping[str, Any]], batch: int
) -> list[tuple[float, float, float]]:
  return [
    (
      x["step"] * batch,
      x["eval_bits_per_char"],
      x["eval_standard_error"]
      * x["eval_bits_per_char"]
      / x["eval_bits_per_token"],
    )
    for x in lines
    if "eval_bits_per_char" in x
  ]


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
    "texts": first.texts,
    "tokens_per_second": float(np.median(speeds)),
    "tokens_per_second_error": recall.standard_error(speeds),
    "function_evaluations": int(np.max(calls)),
    "new_tokens": first.new_tokens,
    "sampler": run.config.sampler.preset,
  }


# --------------------------------------------------------------------- page

_STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --ink: #1c1b19;
  --soft: #67645d; --line: #dcd8ce; --panel: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --paper: #101216; --ink: #e6e8eb;
  --soft: #9aa1ab; --line: #333a44; --panel: #15181d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 62rem;
  background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; overflow-wrap: anywhere; }
p { color: var(--soft); max-width: 46rem; }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: .6rem;
  background: var(--panel); }
table { border-collapse: collapse; width: 100%; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .5rem; white-space: nowrap;
  border-top: 1px solid var(--line); }
tr:first-child th { border-top: 0; white-space: normal; } th:first-child, td:first-child {
  text-align: left; }
svg { display: block; margin: auto; max-width: 100%; min-width: 44rem;
  height: auto; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 .6rem;
  padding: .8rem 1rem; border: 1px solid var(--line); border-radius: .6rem;
  background: var(--panel); font-size: .85rem; }
"""


def page(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns the page of some runs' figures."""
  made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
  parts = [
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
    '<meta name="viewport" content="width=device-width, initial-scale=1">',
    f"<title>{len(rows)} runs compared</title>",
    f"<style>{_STYLE}</style>\n</head>\n<body>",
    f"<h1>{len(rows)} runs compared</h1>",
    f"<p>{made}, jax {jax.__version__}</p>",
    _table(rows),
    *_losses(rows),
    *_likelihoods(rows),
    *_speeds(rows),
    *_texts(rows),
    "<h2>Protocol</h2>",
    *(
      f"<h3>{escape(row['run'])}</h3><p>{escape(row['description'])}</p>"
      f"<pre>{escape(json.dumps(row['protocol'], indent=1))}</pre>"
      for row in rows
    ),
    "</body>\n</html>\n",
  ]
  return "\n".join(parts)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
  names = (
    "run", "step", "tokens seen", "bits per character", "perplexity",
    "training tokens/s", "sampling tokens/s", "network calls",
  )  # fmt: skip
  lines = ["".join(f"<th>{name}</th>" for name in names)]
  for row in rows:
    bits, told = row["likelihood"], row["samples"]
    cells = (
      row["run"],
      f"{row['step']:,}",
      f"{row['tokens']:,}",
      _with_error(bits, "bits_per_char", "bits_per_char_error", 4),
      f"{bits['perplexity']:.3f}" if bits else "",
      _number(row["training_tokens_per_second"]),
      _with_error(told, "tokens_per_second", "tokens_per_second_error", 0),
      str(told["function_evaluations"]) if told else "",
    )
    lines.append("".join(f"<td>{escape(cell)}</td>" for cell in cells))
  body = "\n".join(f"<tr>{line}</tr>" for line in lines)
  return f'<div class="wide"><table>{body}</table></div>'


def _number(value: float | None) -> str:
  return "" if value is None else f"{value:,.0f}"


def _with_error(
  values: Mapping[str, Any] | None, name: str, error: str, digits: int
) -> str:
  if not values:
    return ""
  value = f"{values[name]:,.{digits}f}"
  spread = values[error]
  return f"{value} \u00b1 {spread:,.{digits}f}" if spread else f"{value}, exact"


def _plot(title: str, text: str, svg: str) -> list[str]:
  return [f"<h2>{title}</h2><p>{text}</p>", f'<div class="wide">{svg}</div>']


def _losses(rows: Sequence[Mapping[str, Any]]) -> list[str]:
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
      parts += _plot(title, text, svg)
  return parts


def _likelihoods(rows: Sequence[Mapping[str, Any]]) -> list[str]:
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
    text += f" Nothing is held out in {escape(', '.join(lacking))}."
  if not bars:
    return [f"<h2>Likelihood</h2><p>{text}</p>"]
  svg = bar_plot(bars, y_label="bits per character")
  return _plot("Likelihood", text, svg)


def _speeds(rows: Sequence[Mapping[str, Any]]) -> list[str]:
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
  return _plot("Speed", text, bar_plot(bars, y_label="tokens per second"))


def _texts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
  parts = ["<h2>Samples</h2>"]
  for row in rows:
    if row["samples"]:
      parts.append(
        f"<h3>{escape(row['run'])}: {escape(row['samples']['sampler'])}, "
        f"{row['samples']['function_evaluations']} network calls</h3>"
      )
      parts += [f"<pre>{escape(t)}</pre>" for t in row["samples"]["texts"]]
  return parts if len(parts) > 1 else []

"""`--task=pareto`: speed against quality, of one model and of the baseline.

One diffusion model is sampled over steps, thresholds and policies, and beside it
an autoregressive one with its cache; what is not given is trained. Each point says
tokens per second (generated ones only, compilation apart), network calls, FLOPs
and bytes moved, and quality: perplexity under a judge with the entropy of its
tokens, since either alone is easily made to look good. For machines that are not
here, `decoders` says by their rooflines how many tokens a call must write to be
faster than the baseline.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
import platform
from typing import Any

import jax

from dllm_jax.config import config as configs
from dllm_jax.core import check
from dllm_jax.core.paths import Path
from dllm_jax.evaluation.benchmarks import finetune
from dllm_jax.evaluation.likelihood import scorer
from dllm_jax.evaluation.samples import decoders, speed
from dllm_jax.evaluation.tasks.registry import option, Setting, Task
from dllm_jax.plots import line_plot
from dllm_jax.run.run import Run
from dllm_jax.sampling.presets import SamplerConfig

_BASELINE = "autoregressive, cached"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pareto:
  """What `--task=pareto` is told.

  Attributes: as their help says.
  """

  diffusion: str = option(
    "",
    "the run of the diffusion model; by default that in --workdir, or one that is "
    "trained 4 times as long as --recipe says",
    path=True,
  )
  autoregressive: str = option(
    "",
    "the run of the autoregressive baseline; by default one that is trained as "
    "long as --recipe says",
    path=True,
  )
  judge: str = option(
    "",
    "the autoregressive run that judges; by default one that is trained twice as "
    "long as the baseline, with another seed",
    path=True,
  )
  recipe: str = option(
    "shakespeare", "the configuration of what is trained", path=True
  )
  policies: str = option("mdlm,llada", "presets that are tried over --steps")
  steps: str = option("4,8,16,32,64", "network calls for the canvas")
  threshold_policies: str = option(
    "llada,fast_dllm", "presets that are tried over --thresholds"
  )
  thresholds: str = option("0.3,0.5,0.7,0.9", "confidences that reveal a slot")
  temperature: float = option(1.0, "of all samplers")
  samples: int = option(16, "texts of each point, one batch")
  length: int = option(0, "tokens of a text; 0 for the training length")
  rounds: int = option(5, "timed rounds of each point; the median counts")
  networks: str = option(
    "llada_1b,dream_7b,llada_8b",
    "configurations whose two decoders are set against each other by roofline",
  )
  chips: str = option("h100,v5p", "of which machines, one chip each")
  context: int = option(2048, "slots of a row's cache there")
  block: int = option(32, "slots that a call of the diffusion decoder computes")
  seed: int = option(0, "the seed of the samples")

  def __post_init__(self):
    check.at_least(self, 2, "samples", "rounds", prefix="--")
    check.at_least(self, 1, "context", "block", prefix="--")
    self.points()

  def points(self) -> dict[str, SamplerConfig]:
    """Returns the samplers to try, by name.

    Raises:
      ValueError: a list has something else in it.
    """
    found = {}
    heat = {"temperature": self.temperature}
    for name in _list("policies", self.policies, str):
      for steps in _list("steps", self.steps, int):
        found[f"{name}, {steps} steps"] = SamplerConfig(
          preset=name, steps=steps, **heat
        )
    for name in _list("threshold_policies", self.threshold_policies, str):
      for value in _list("thresholds", self.thresholds, float):
        found[f"{name}, threshold {value:g}"] = SamplerConfig(
          preset=name, threshold=value, **heat
        )
    return found

  def trial(self, length: int) -> speed.Trial:
    """Returns what samplers are asked for, of texts as long unless told."""
    return speed.Trial(
      length=self.length or length,
      samples=self.samples,
      rounds=self.rounds,
      seed=self.seed,
    )

  def levels(self) -> list[decoders.Level]:
    """Returns where decoders are level on machines that are not here.

    Raises:
      FileNotFoundError: there is no such network.
      ValueError: there is no such machine, or it does not hold it.
    """
    names = _list("networks", self.networks, str)
    chips = _list("chips", self.chips, str)
    return list(
      decoders.levels(names, chips, context=self.context, block=self.block)
    )


def _list(name: str, text: str, kind: type) -> list:
  try:
    return [kind(part) for part in text.split(",") if part.strip()]
  except ValueError:
    raise ValueError(
      f"--{name} must be of type {kind.__name__} with commas between, not "
      f"{text!r}"
    ) from None


def _run(setting: Setting, options: Pareto) -> Mapping[str, Any]:
  levels = options.levels()
  try:
    run, baseline, judge = _models(setting, options)
  except finetune.InterruptedTask as stop:
    return {"interrupted": True, "message": str(stop)}
  setting = finetune.about(run, setting)
  trial = options.trial(run.config.data.length)
  judged = scorer.Scorer.of(judge, use_ema=setting.use_ema)
  tried = {name: (run, sampler) for name, sampler in options.points().items()}
  own = SamplerConfig(preset="autoregressive", temperature=options.temperature)
  tried[_BASELINE] = (baseline, own)
  for one, sampler in tried.values():
    trial.built(one, sampler)  # what does not fit says so before any is run
  ledger = setting.ledger(
    "pareto",
    {
      "task": "pareto",
      "baseline": str(baseline.workdir),
      "baseline_step": int(baseline.state.step),
      "judge": str(judge.workdir),
      "judge_step": int(judge.state.step),
      "judge_is_baseline": judge.workdir == baseline.workdir,
      **dataclasses.asdict(trial),
      "temperature": options.temperature,
      "samplers": {k: dataclasses.asdict(v) for k, (_, v) in tried.items()},
      "device": _device(run),
    },
  )
  if missing := {n: tried[n] for n in tried if n not in ledger}:
    seconds = trial.seconds(list(missing.values()))
    print(f"sampling takes at most {seconds / 60:.0f} minutes here", flush=True)

  def measure(names: Sequence[str]) -> list[dict[str, Any]]:
    return [speed.measured(*tried[n], trial, judged, judge) for n in names]

  values = ledger.each(list(tried), measure, unit="point")
  rows = [
    {"point": name, "model": _family(name)} | value
    for name, value in zip(tried, values, strict=True)
  ]
  for row in rows:
    row["pareto"] = not any(_better(other, row) for other in rows)
  result = {
    "interrupted": False,
    "rows": rows,
    "parameters": {
      "diffusion": _parameters(run),
      "autoregressive": _parameters(baseline),
    },
    "held_out": speed.reference(judge, judged, trial),
    "levels": [dataclasses.asdict(level) for level in levels],
    "protocol": ledger.protocol,
  }
  if jax.process_index() == 0:
    result |= _write(result, levels, setting.workdir / "evaluation")
  return result


def _models(setting: Setting, options: Pareto) -> list[Run]:
  """Returns the diffusion model, the baseline and the judge.

  Raises:
    InterruptedTask: training was stopped before its end.
    ValueError: what is given is of another kind.
  """
  here = setting.workdir
  given = options.diffusion
  if not given and (here / "config.json").exists():
    given = here
  runs = {
    "diffusion": Run.open(given) if given else None,
    "autoregressive": _opened("autoregressive", options.autoregressive),
    "judge": _opened("judge", options.judge),
  }
  own = configs.load(options.recipe)
  own.training.steps *= 4
  baseline = configs.load(options.recipe, {"objective": "autoregressive"})
  if runs["autoregressive"]:
    baseline = runs["autoregressive"].resolved
  judge = configs.resolve(baseline.to_dict())
  judge.training.seed += 1
  judge.training.steps *= 2
  recipes = {"diffusion": own, "autoregressive": baseline, "judge": judge}
  missing = [name for name, run in runs.items() if run is None]
  lessons = [
    finetune.Lesson(workdir=here / name, resolved=recipes[name])
    for name in missing
  ]
  taught = finetune.teach(lessons, progress=setting.progress)
  return list((runs | dict(zip(missing, taught, strict=True))).values())


def _opened(name: str, workdir: str) -> Run | None:
  if not workdir:
    return None
  run = Run.open(workdir)
  if run.objective.shift != 1 or run.objective.block_length != 1:
    raise ValueError(
      f"--{name}={workdir} holds a run of {run.resolved.objective.name}; give "
      "one whose objective is autoregressive"
    )
  return run


def _family(name: str) -> str:
  policy, _, how = name.partition(", ")
  return f"{policy}, thresholds" if how.startswith("threshold") else policy


def _device(run: Run) -> str:
  kind = run.mesh.devices.flat[0].device_kind
  return (
    f"{run.mesh.size} x {kind}, {os.cpu_count()} cores, "
    f"{platform.machine()}, jax {jax.__version__}"
  )


def _parameters(run: Run) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(run.state.params))


def _better(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
  """Whether a point is at least as fast and as good, and one of both more."""
  if a["perplexity"] is None or b["perplexity"] is None:
    return b["perplexity"] is None and a["perplexity"] is not None
  faster = a["tokens_per_second"] - b["tokens_per_second"]
  nicer = b["perplexity"] - a["perplexity"]
  return faster >= 0 and nicer >= 0 and faster + nicer > 0


def _table(result: Mapping[str, Any]) -> str:
  if "message" in result:
    return result["message"]
  lines = [
    "| sampler | tokens/s | seconds | calls | tokens a call | perplexity | error "
    "| entropy, nats | MFLOP/token | FLOP/byte | front |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
  ]
  for row in result["rows"]:
    if row["perplexity"] is None:
      continue
    lines.append(
      f"| {row['point']} | {row['tokens_per_second']:.0f} "
      f"| {row['seconds']:.2f} | {row['function_evaluations']} "
      f"| {row['tokens_per_call']:.2f} | {row['perplexity']:.2f} "
      f"| {row['standard_error']:.2f} | {row['entropy']:.2f} "
      f"| {row['flops_per_token'] / 1e6:.1f} | {row['flops_per_byte']:.2f} "
      f"| {'yes' if row['pareto'] else ''} |"
    )
  held = result["held_out"]
  if held and held["perplexity"] is not None:
    lines.append(
      f"| held-out text | | | | | {held['perplexity']:.2f} "
      f"| {held['standard_error']:.2f} | {held['entropy']:.2f} | | | |"
    )
  return "\n".join(lines) + "\n"


def _write(
  result: Mapping[str, Any], levels: Sequence[decoders.Level], folder: Path
) -> dict[str, str]:
  """Writes pareto.json, pareto.md and three plots."""
  folder.mkdir(parents=True, exist_ok=True)
  dump = json.dumps(result, indent=2) + "\n"
  (folder / "pareto.json").write_text(dump, encoding="utf-8")
  tried = [row for row in result["rows"] if row["point"] != _BASELINE]
  page = _table(result) + "\n" + decoders.table(levels, tried)
  (folder / "pareto.md").write_text(page, encoding="utf-8")
  picture = decoders.picture(levels, tried)
  (folder / "pareto_decoders.svg").write_text(picture, encoding="utf-8")
  axes = {
    "tokens_per_second": "generated tokens per second",
    "function_evaluations": "network calls",
  }
  for field, label in axes.items():
    curves: dict[str, list] = {}
    for row in result["rows"]:
      if row["perplexity"] is not None:
        point = (row[field], row["perplexity"], row["standard_error"])
        curves.setdefault(row["model"], []).append(point)
    plot = line_plot(
      {name: sorted(points) for name, points in curves.items()},
      x_label=label,
      y_label="perplexity under the judge",
      log_x=True,
    )
    (folder / f"pareto_{field}.svg").write_text(plot, encoding="utf-8")
  return {
    "table": str(folder / "pareto.md"),
    "plot": str(folder / "pareto_tokens_per_second.svg"),
    "decoders": str(folder / "pareto_decoders.svg"),
  }


TASK = Task(
  summary="speed against quality over steps, thresholds and policies, beside "
  "a cached autoregressive baseline",
  run=_run,
  text=_table,
  options=Pareto,
  opens=False,
)

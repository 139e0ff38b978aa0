"""Models as tasks use them: taught a text of their own, asked to fill rows."""

from collections.abc import Sequence
import dataclasses
import hashlib
from typing import Any

from dllm_jax.config import config as configs
from dllm_jax.core.files import write_whole
from dllm_jax.core.paths import Path
from dllm_jax.evaluation.tasks.registry import Setting
from dllm_jax.run import timing
from dllm_jax.run.run import Run
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.training import checkpoint


class InterruptedTask(RuntimeError):
  """Training was stopped, and saved; the same command continues."""


def digest(*texts: str) -> str:
  """Returns a short name of a content: the same text, the same name."""
  name = hashlib.sha256("\0".join(texts).encode(errors="surrogatepass"))
  return name.hexdigest()[:10]


def kept(folder: Path, stem: str, text: str, suffix: str) -> str:
  """Writes a text under a name that tells its content; returns the path."""
  path = folder / f"{stem}-{digest(text)}{suffix}"
  if not path.exists():
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
  return str(path)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lesson:
  """What a model is to be trained on.

  Attributes:
    workdir: its directory.
    resolved: its configuration.
  """

  workdir: Path
  resolved: configs.ConfigDict


def lesson(
  workdir: Path,
  *,
  recipe: str,
  objective: str,
  text: str,
  tokenizer: str,
  length: int,
  steps: int = 0,
) -> Lesson:
  """Returns a lesson on a text.

  Args:
    workdir: the directory of what is trained.
    recipe: the configuration; its data and objective are replaced.
    objective: the name of the objective.
    text: the path of the text, of which each `length` tokens are a row.
    tokenizer: as `config.data.tokenizer`.
    length: tokens a row.
    steps: training steps; 0 for the recipe's.
  """
  resolved = configs.load(recipe, {"objective": objective})
  resolved.data.update({
    "path": text,
    "tokenizer": tokenizer,
    "length": length,
    "held_out": 0.0,
  })
  resolved.training.steps = steps or resolved.training.steps
  return Lesson(workdir=workdir, resolved=resolved)


def teach(lessons: Sequence[Lesson], *, progress: bool = False) -> list[Run]:
  """Returns a trained run of each lesson; what was begun continues.

  It says before it starts how long that takes, by timing some steps.

  Args:
    lessons: what to train.
    progress: whether to draw bars on standard error.

  Raises:
    InterruptedTask: training was stopped before its end.
    ValueError: a directory holds a run of something else, or a step does not fit
      into memory.
  """
  runs = []
  for one in lessons:
    one.resolved.logging.progress = progress
    runs.append(Run.create(one.resolved, one.workdir))
  seconds = 0.0
  for one in lessons:
    done = [0, *checkpoint.steps_in(one.workdir)][-1]
    if (missing := one.resolved.training.steps - done) > 0:
      cost = timing.timed(one.resolved, one.workdir.name)
      seconds += missing * cost["seconds"] + cost["compile_seconds"]
  if seconds:
    print(f"training takes about {seconds / 60:.0f} minutes here", flush=True)
  for one, run in zip(lessons, runs, strict=True):
    print(f"{one.workdir.name}: {run.describe()}", flush=True)
    if run.train()["interrupted"]:
      raise InterruptedTask(
        f"{one.workdir} was stopped and saved; the same command continues"
      )
  return runs


def fill(
  run: Run,
  templates: Sequence[Sequence[int | None]],
  *,
  length: int,
  sampler: SamplerConfig,
  use_ema: bool = True,
  rows: int = 0,
  seed: int = 0,
) -> tuple[list[list[int]], Any]:
  """Returns finished rows, and what sampling them cost.

  Args:
    run: whose network.
    templates: token ids, None where one is wanted.
    length: slots of a row, the token that a canvas may begin with apart.
    sampler: how to sample.
    use_ema: whether to use averaged parameters.
    rows: rows of the compiled batch; fewer templates are repeated.
    seed: the seed of the samples.
  """
  asked = [*templates, *[templates[-1]] * (rows - len(templates))]
  extra = run.objective.begin_id is not None
  sampled = run.sample_rows(
    asked,
    length=length + extra,
    seed=seed,
    sampler=sampler,
    use_ema=use_ema,
  )
  return sampled.rows[: len(templates)], sampled


def greedy(run: Run, setting: Setting) -> SamplerConfig:
  """Returns the sampler asked for; by default the best token, the surest first.

  A task that opens its runs itself sees the flags of the command line on top of
  the defaults: where there are none, answers are deterministic.
  """
  if setting.sampler != SamplerConfig():
    return setting.sampler
  causal = run.objective.block_length == 1
  return SamplerConfig(
    preset="autoregressive" if causal else "llada", temperature=0.0
  )


def about(run: Run, setting: Setting) -> Setting:
  """Returns a setting whose partial results are about a run."""
  return dataclasses.replace(setting, run=run)

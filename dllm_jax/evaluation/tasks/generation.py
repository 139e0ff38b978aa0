"""`--task=generation`: samples under a judge, with what shows that it is fooled."""

from collections.abc import Mapping, Sequence
import dataclasses
import importlib.util
import math
from typing import Any

import numpy as np

from dllm_jax import data
from dllm_jax.evaluation.likelihood.documents import mean
from dllm_jax.evaluation.samples import quality
from dllm_jax.evaluation.samples.judge import Judge, open_judge
from dllm_jax.evaluation.tasks.registry import option, Setting, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """What `--task=generation` is told.

  Attributes: as their help says.
  """

  judge: str = option(
    "",
    "an autoregressive run, or a published folder, that judges the samples",
    path=True,
  )
  num_samples: int = option(64, "samples, and held-out texts beside them")
  length: int = option(0, "slots of a sample; 0 for the trained length")
  batch_size: int = option(16, "samples at once")
  seed: int = option(0, "seed of the samples")

  def __post_init__(self):
    if not self.judge:
      raise ValueError(
        "--judge must be given: a working directory of an autoregressive run, "
        "or a published folder"
      )
    if self.num_samples < 4:
      raise ValueError(
        f"--num_samples must be at least 4, not {self.num_samples}: errors and "
        "histograms need several"
      )
    if self.batch_size < 1 or self.length < 0:
      raise ValueError("--batch_size must be at least 1, --length at least 0")
    for package, name in (
      ("sacrebleu", "sacrebleu"),
      ("sklearn", "scikit-learn"),
    ):
      if importlib.util.find_spec(package) is None:
        raise ValueError(
          f"--task=generation needs {name}; install dllm_jax[eval]"
        )


def _run(setting: Setting, options: Generation) -> Mapping[str, Any]:
  run = setting.run
  judge = open_judge(options.judge)
  length = options.length or run.config.data.length
  real = _held_out(run, options.num_samples, length)
  protocol = setting.protocol({
    "task": "generation",
    "judge": options.judge,
    "features": "the judge's last hidden state at the last token",
    "sampler": dataclasses.asdict(setting.sampler),
    "samples": options.num_samples,
    "references": len(real),
    "length": length,
    "seed": options.seed,
  })
  ledger = setting.ledger("generation", protocol)

  def write(part: Sequence[int]) -> list[list[int]]:
    missing = options.batch_size - len(part)
    sampled = run.sample_rows(
      [run.generator.templates([""], length=length)[0]] * options.batch_size,
      length=length,
      seed=options.seed,
      sampler=setting.sampler,
      use_ema=setting.use_ema,
      numbers=[*part, *[part[-1]] * missing],
    )
    return sampled.rows[: len(part)]

  rows = ledger.each(
    range(options.num_samples),
    write,
    at_once=options.batch_size,
    unit="sample",
  )
  written, human = (
    measure(judge, run.tokenizer, ids, options.batch_size)
    | _word_share(run, ids)
    for ids in (rows, real)
  )
  features = [
    judge.features(_texts(run.tokenizer, ids), rows=options.batch_size)
    for ids in (real, rows)
  ]
  return written | {
    "mauve": quality.mauve(*features, seed=options.seed),
    "held_out": human,
    "samples": _texts(run.tokenizer, rows[:2]),
    "protocol": protocol,
  }


def _texts(tokenizer, rows: Sequence[Sequence[int]]) -> list[str]:
  return [tokenizer.decode(row) for row in rows]


def _word_share(run, rows: Sequence[Sequence[int]]) -> dict[str, float]:
  """Returns the share of words that the training text has, if it is at hand."""
  known = getattr(run.corpus.train, "tokens", None)
  if known is None:  # records on disk, or a stream
    return {}
  texts = _texts(run.tokenizer, rows)
  return {"word_share": quality.word_share(texts, run.tokenizer.decode(known))}


def _held_out(run, count: int, length: int) -> list[list[int]]:
  """Returns held-out texts of the samples' length, evenly spread."""
  if run.corpus.held_out is None:
    raise ValueError(
      "nothing is held out to compare samples with: set config.data.held_out "
      "above 0"
    )
  batches = data.held_out_batches(run.corpus, batch_size=1)
  stream = np.concatenate([b.tokens[b.segment_ids > 0] for b in batches])
  most = len(stream) // length
  if most < 4:
    raise ValueError(
      f"the held-out text has {most} pieces of {length} tokens; at least 4 are "
      "needed: lower --length"
    )
  pieces = stream[: most * length].reshape(most, length)
  chosen = np.linspace(0, most - 1, min(count, most)).astype(int)
  return pieces[chosen].tolist()


def measure(
  judge: Judge, tokenizer, rows: Sequence[Sequence[int]], at_once: int
) -> dict[str, Any]:
  """Returns the figures of some texts, each with its standard error.

  The perplexity is that of all tokens of the judge together; its error is from
  the spread over texts. Distinct n-grams have none: they are of the whole set.
  """
  rows = [row for row in rows if row]
  texts = _texts(tokenizer, rows)
  texts = [text for text in texts if len(judge.encode(text)) > judge.given]
  if len(texts) < 2:
    raise ValueError("fewer than two samples hold any text: nothing to judge")
  scored = np.array(judge.nats(texts, rows=at_once))
  per_token = scored[:, 0].sum() / scored[:, 1].sum()
  residual = scored[:, 0] - per_token * scored[:, 1]
  error = math.sqrt(len(scored) * residual.var(ddof=1)) / scored[:, 1].sum()
  entropy = mean([quality.unigram_entropy(row) for row in rows])
  bleu = mean(quality.self_bleu(rows))
  return {
    "generative_perplexity": math.exp(per_token),
    "generative_perplexity_error": math.exp(per_token) * error,
    "unigram_entropy_bits": entropy[0],
    "unigram_entropy_error": entropy[1],
    "self_bleu": bleu[0],
    "self_bleu_error": bleu[1],
    **{f"distinct_{n}": quality.distinct(rows, n) for n in (1, 2, 3, 4)},
    "texts": len(texts),
  }


def _report(figures: Mapping[str, Any]) -> str:
  names = ["generative_perplexity", "unigram_entropy_bits", "self_bleu",
           "distinct_1", "distinct_2", "distinct_3", "distinct_4"]  # fmt: skip
  names += ["word_share"] if "word_share" in figures else []
  errors = {"generative_perplexity": "generative_perplexity_error",
            "unigram_entropy_bits": "unigram_entropy_error",
            "self_bleu": "self_bleu_error"}  # fmt: skip
  lines = ["| figure | samples | error | held-out text |", "|---|---|---|---|"]
  for name in names:
    error = figures.get(errors.get(name, ""), None)
    lines.append(
      f"| {name.replace('_', ' ')} | {figures[name]:.3f} | "
      f"{'' if error is None else f'{error:.3f}'} | "
      f"{figures['held_out'][name]:.3f} |"
    )
  lines.append(f"| mauve | {figures['mauve']:.3f} | | 1 |")
  return "\n".join(lines)


TASK = Task(
  summary=(
    "samples under a judge: perplexity, entropy, distinct n-grams, known "
    "words, self-BLEU, MAUVE"
  ),
  run=_run,
  text=_report,
  options=Generation,
)

"""Speed and quality of one sampler on empty canvases."""

from collections.abc import Sequence
import dataclasses
import math
import time
from typing import Any

import jax
import numpy as np

from dllm_jax.evaluation.benchmarks import finetune, recall
from dllm_jax.evaluation.likelihood import scorer
from dllm_jax.evaluation.samples import quality, traffic
from dllm_jax.run.run import Run
from dllm_jax.sampling.generator import Sampled
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.sampling.sampler import Sampler


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
  """What samplers are asked for.

  Attributes:
    length: tokens of a text.
    samples: texts, one batch.
    rounds: timed rounds; the median counts.
    seed: of the samples.
  """

  length: int
  samples: int
  rounds: int
  seed: int

  def sampled(
    self, run: Run, config: SamplerConfig
  ) -> tuple[list[list[int]], Sampled]:
    """Returns rows, and what sampling them cost."""
    empty = [[None] * self.length] * self.samples
    return finetune.fill(
      run, empty, length=self.length, sampler=config, seed=self.seed
    )

  def built(self, run: Run, config: SamplerConfig) -> Sampler:
    """Returns the sampler of such texts.

    Raises:
      ValueError: it does not fit the run.
    """
    extra = run.objective.begin_id is not None
    return config.build(
      run.objective,
      length=self.length + extra,
      end_ids=run.tokenizer.end_ids,
    )

  def seconds(self, tried: Sequence[tuple[Run, SamplerConfig]]) -> float:
    """Returns the seconds that samplers take at most, by trying the first twice.

    No call is taken to cost more than one of the first's, and each sampler to make
    as many as it may.
    """
    start = time.perf_counter()
    once = self.sampled(*tried[0])[1].seconds
    compiling = time.perf_counter() - start - once
    again = self.sampled(*tried[0])[1]
    call = again.seconds / _calls(again)
    built = [self.built(*one) for one in tried]
    most = sum(sampler.steps * sampler.blocks for sampler in built)
    return len(tried) * compiling + most * call * (self.rounds + 1)


def measured(
  run: Run,
  config: SamplerConfig,
  trial: Trial,
  judged: scorer.Scorer,
  judge: Run,
) -> dict[str, Any]:
  """Returns the figures of one sampler.

  Args:
    run: whose network.
    config: how it is sampled.
    trial: what is asked for.
    judged: the judge's scores.
    judge: the judge.
  """
  once = lambda: trial.sampled(run, config)
  rows, sampled = once()
  seconds = [once()[1].seconds for _ in range(trial.rounds)]
  calls = _calls(sampled)
  tokens = sum(map(len, rows))
  built = trial.built(run, config)
  cost = traffic.generation(run, built, rows=trial.samples, calls=calls)
  middle = float(np.median(seconds))
  return {
    "tokens_per_second": tokens / middle,
    "seconds": middle,
    "seconds_quartiles": np.quantile(seconds, (0.25, 0.75)).tolist(),
    "tokens": tokens,
    "function_evaluations": calls,
    "tokens_per_call": tokens / trial.samples / calls,
    "flops_per_token": cost.flops / tokens,
    "bytes_per_token": cost.bytes / tokens,
    "flops_per_byte": cost.flops / cost.bytes,
    **judgement(sampled.texts[: len(rows)], judged, judge),
  }


def _calls(sampled: Sampled) -> int:
  """Returns the network calls of a batch: those of its slowest row."""
  evaluations = jax.device_get(sampled.generation.function_evaluations)
  return int(np.max(evaluations))


def judgement(
  texts: Sequence[str], judged: scorer.Scorer, judge: Run
) -> dict[str, Any]:
  """Returns perplexity under the judge and unigram entropy, with their errors.

  Perplexity is exp of the mean nats per token over all texts; its error follows
  from that of the mean over texts, to first order.
  """
  items = [
    scorer.Item(tokens=tuple(int(i) for i in judge.tokenizer.encode(text)))
    for text in texts
    if text
  ]
  if len(items) < 2:
    return {"perplexity": None, "entropy": None}
  nats = judged.score(items, samples=1, key=jax.random.key(0), rows=len(items))
  sizes = np.asarray([len(item.tokens) for item in items])
  mean = float(nats.sum() / sizes.sum())
  # A ratio of means: its residuals are those of nats - mean * size.
  error = recall.standard_error((nats - mean * sizes) / sizes.mean())
  entropies = [  # nats
    math.log(2) * quality.unigram_entropy(item.tokens) for item in items
  ]
  return {
    "perplexity": math.exp(mean),
    "standard_error": math.exp(mean) * error,
    "entropy": float(np.mean(entropies)),
    "entropy_error": recall.standard_error(entropies),
  }


def reference(
  judge: Run, judged: scorer.Scorer, trial: Trial
) -> dict[str, Any] | None:
  """Returns the same figures of the judge's held-out text."""
  held = judge.corpus.held_out
  if held is None or not hasattr(held, "tokens"):
    return None
  ids = held.tokens[: trial.samples * trial.length].reshape(-1, trial.length)
  texts = [judge.tokenizer.decode(row) for row in ids]
  return judgement(texts, judged, judge)

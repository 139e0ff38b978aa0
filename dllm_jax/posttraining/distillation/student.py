"""Distillation of a run: what its method learns from, and the training.

dparallel, d3llm  prompts -> the teacher's answers -> certainty forcing
dcd               text -> rounds, each taught by the student before it
"""

from collections.abc import Callable, Sequence
import os
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from dllm_jax.config import config as configs
from dllm_jax.config.config import Config
from dllm_jax.core import paths
from dllm_jax.data import Dataset, Tokenizer
from dllm_jax.parallel import distributed, row_share
from dllm_jax.posttraining.distillation import answers as answers_lib
from dllm_jax.posttraining.distillation import rounds
from dllm_jax.posttraining.distillation.certainty import (
  CertaintyForcing,
  Forced,
)
from dllm_jax.posttraining.distillation.dcd import DCD
from dllm_jax.posttraining.train import train
from dllm_jax.run.begin import begin
from dllm_jax.run.run import Run
from dllm_jax.sampling import requests
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.training.step import TrainState


def distil(
  source: Run,
  output: str | os.PathLike,
  resolved: ConfigDict,
  method: CertaintyForcing | DCD,
  *,
  sampler: SamplerConfig | None = None,
  seed: int = 0,
) -> dict[str, Any]:
  """Trains a student, or continues; returns a summary.

  Args:
    source: the teacher, with whose parameters the student begins.
    output: the student's directory.
    resolved: the student's configuration; `data` names conversations, of which
      the prompts are asked, or text for `DCD`.
    method: how.
    sampler: how the teacher answers; by default as the source is configured.
    seed: of its answers.

  Raises:
    ValueError: what was given does not fit; nothing is written then.
    FileNotFoundError: there are no data, or the source has no checkpoint.
  """
  method.check(source.objective)
  config = configs.parse(resolved)
  if isinstance(method, DCD):
    _check_whole(config, source)
    run = begin(source, output, resolved, method)
    return rounds.train(run, method)
  _check_batches(config, method)
  with distributed.together():
    examples = load_examples(config.data, source.tokenizer)
  prompts = [one.tokens[: one.given].tolist() for one in examples.train]
  answers_lib.check_room(prompts, config.data.length)
  run = begin(source, output, resolved, method)
  answers = answers_lib.ask(
    source,
    prompts,
    paths.place(output),
    length=config.data.length,
    sampler=sampler or source.config.sampler,
    batch_size=config.evaluation.batch_size,
    seed=seed,
  )
  kept = ended(answers)
  measured = Measured(run, examples.held_out)
  summary = _train(run, method, kept, measured.figures)
  if summary["interrupted"] or not examples.held_out:
    return {"answers": len(kept)} | summary
  before = measured.of(source, source.state)
  return {"answers": len(kept)} | {"before": before} | summary


def _check_whole(config: Config, source: Run) -> None:
  adapter = getattr(config.network(source.objective), "adapter", None)
  if adapter is not None and adapter.rank:
    raise ValueError(
      "dcd makes a teacher of the whole student: leave "
      "config.model.adapter.rank 0"
    )


def _check_batches(config: Config, method: CertaintyForcing) -> None:
  parts = config.training.microbatches
  if method.normalisation == "masked" and parts > 1:
    raise ValueError(
      "a mean over the masked tokens of a batch cannot be put together from "
      f"training.microbatches {parts}: set it to 1, or normalisation to "
      "masked_sequence"
    )


def load_examples(dataset: Dataset, tokenizer: Tokenizer) -> Any:
  """Returns conversations, whose prompts are asked.

  Raises:
    FileNotFoundError: they do not exist.
    ValueError: there are none.
  """
  from dllm_jax.data.conversations import load_examples as load  # noqa: PLC0415

  return load(dataset, tokenizer)


def ended(
  answers: Sequence[answers_lib.Answer],
) -> list[answers_lib.Answer]:
  """Returns the answers that fit their rows, and says how many those are.

  Raises:
    ValueError: none does.
  """
  kept = [answer for answer in answers if answer.ended]
  if not kept:
    raise ValueError(
      f"none of the teacher's {len(answers)} answers ends within its row: raise "
      "config.data.length, or ask with another --sampler"
    )
  lengths = [len(answer.tokens) - answer.given for answer in kept]
  calls = [answer.calls for answer in kept]
  print(
    f"answers: {len(kept)} of {len(answers)} end within their rows, "
    f"{np.mean(lengths):.1f} tokens in {np.mean(calls):.1f} calls each",
    flush=True,
  )
  return kept


def _train(
  run: Run,
  method: CertaintyForcing,
  answers: Sequence[answers_lib.Answer],
  evaluate: Callable[[TrainState], dict[str, float]] | None,
) -> dict[str, Any]:
  """Trains on answers, or continues; returns a summary."""
  training, tokenizer = run.config.training, run.tokenizer
  rows = answers_lib.AnswerRows(
    answers,
    length=run.config.data.length,
    fill=tokenizer.eos_id,
    counted=run.config.fill.kind == "counted",
  )
  return train(
    run,
    Forced(objective=run.objective, method=method, steps=training.steps),
    batches=answers_lib.batches(
      rows,
      len(answers),
      batch_size=training.batch_size,
      seed=training.seed,
      share=row_share(run.mesh),
    ),
    blank=rows.batch([0] * training.batch_size),
    evaluate=evaluate,
  )


class Measured:
  """Held-out prompts, and what answers to them cost and are worth.

  Args:
    run: the student, which says how it is sampled and how many prompts are read
      (`evaluation.batches` of `evaluation.batch_size`; 0 for all).
    examples: conversations.
  """

  def __init__(self, run: Run, examples: Sequence[Any]):
    evaluation = run.config.evaluation
    most = evaluation.batches * evaluation.batch_size or len(examples)
    self._run, self._examples = run, list(examples)[:most]

  @property
  def figures(self) -> Callable[[TrainState], dict[str, float]] | None:
    """What is logged of a state; None without prompts."""
    if not self._examples:
      return None
    return lambda state: {
      f"eval_{name}": value for name, value in self.of(self._run, state).items()
    }

  def of(self, run: Run, state: TrainState) -> dict[str, float]:
    """Returns calls, tokens a call, and how many answers are as they should be.

    Args:
      run: whose network.
      state: its parameters.
    """
    length = self._run.config.data.length
    size = self._run.config.evaluation.batch_size
    ends, same, calls, tokens = run.tokenizer.end_ids, [], [], []
    for start in range(0, len(self._examples), size):
      here = self._examples[start : start + size]
      filled = [*here, *[here[-1]] * (size - len(here))]
      prompts = [one.tokens[: one.given].tolist() for one in filled]
      rows = [requests.continuation(p, length=length) for p in prompts]
      sampled = run.sample_rows(
        rows,
        length=length,
        state=state,
        sampler=self._run.config.sampler,
        numbers=range(start, start + size),
      )
      made = jax.device_get(sampled.generation)
      for i, one in enumerate(here):
        got = requests.answered(made.tokens[i].tolist(), rows[i], ends)
        want = [t for t in one.tokens[one.given :].tolist() if t not in ends]
        same.append(got == want)
        tokens.append(len(got) + 1)
        calls.append(int(made.function_evaluations[i]))
    return {
      "exact_match": float(np.mean(same)),
      "calls": float(np.mean(calls)),
      "tokens_per_call": float(np.sum(tokens) / np.sum(calls)),
    }

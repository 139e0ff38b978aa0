"""Measuring the engine: saturated, and beside static batches.

`saturated` alternates the engine with the sampling program on the same requests;
`arrivals` lets requests come one by one, by a fixed schedule, and compares with a
server that waits until a batch is full. Both without HTTP: what that adds is
measured by a client (`serving`).
"""

from collections.abc import Mapping, Sequence
import dataclasses
import statistics
import threading
import time
from typing import Any

import numpy as np

from dllm_jax.reports.benchmark import prompts
from dllm_jax.run.run import Run
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.sampling.requests import Template
from dllm_jax.serving.engine import Engine
from dllm_jax.serving.requests import Committed, Finished, Request


@dataclasses.dataclass
class Answer:
  """When a request was sent, and answered; seconds since a common start.

  Attributes:
    sent: when.
    first: when its first tokens came.
    last: when it was over.
    tokens: how many came.
  """

  sent: float
  first: float = float("nan")
  last: float = float("nan")
  tokens: int = 0


def load(
  engine: Engine, rows: Sequence[Template], at: Sequence[float]
) -> list[Answer]:
  """Returns how requests were answered that come at given times.

  Args:
    engine: a started one.
    rows: a template for each request.
    at: when each comes, in ascending order; seconds from now.

  Raises:
    RuntimeError: one was not answered.
  """
  begin, over = time.perf_counter(), threading.Semaphore(0)
  clock = lambda: time.perf_counter() - begin
  answers, reasons = [Answer(sent=moment) for moment in at], []

  def listener(answer):
    def hear(event):
      if isinstance(event, Committed):
        if not answer.tokens:
          answer.first = clock()
        answer.tokens += len(event.tokens)
      elif isinstance(event, Finished):
        answer.last = clock()
        reasons.append(event.reason)
        over.release()

    return hear

  for number, (row, moment) in enumerate(zip(rows, at, strict=True)):
    time.sleep(max(0.0, moment - clock()))
    request = Request(template=tuple(row), number=number)
    engine.submit(request, listener(answers[number]))
  for _ in rows:
    over.acquire()
  if set(reasons) - {"length", "stop"}:
    raise RuntimeError(f"requests were not answered: {reasons}")
  return answers


def saturated(
  run: Run,
  sampler: SamplerConfig,
  *,
  slots: int = 8,
  rounds: int = 3,
  waves: int = 2,
  prompt_tokens: int | None = None,
) -> dict[str, Any]:
  """Returns the engine's speed with all slots taken, beside the sampler's.

  Args:
    run: whose network; an untrained one is as fast as a trained one.
    sampler: how to sample.
    slots: rows that run at once, and of the sampler's batch.
    rounds: timed rounds of both, in alternation.
    waves: requests a slot in each round.
    prompt_tokens: random tokens before what is sampled; None for a third of the
      canvas.

  Returns:
    `tokens_per_second` of the engine, `sampler_tokens_per_second` (medians),
    `ratio` (the median over rounds), `compile_seconds`, `calls_per_token`.
  """
  length = run.config.data.length
  rows = prompts(run, length, slots, prompt_tokens, False)
  engine = Engine.of(
    run, sampler=sampler, slots=slots, queue=waves * slots, length=length
  )
  compiled = engine.compile()
  once = lambda seed: run.sample_rows(
    rows, length=length, sampler=sampler, seed=seed
  )
  once(0)
  engine.start()
  found = []
  for seed in range(1, rounds + 1):
    sampled = once(seed)
    offline = sampled.new_tokens / sampled.seconds
    answers = load(engine, rows * waves, [0.0] * slots * waves)
    seconds = max(answer.last for answer in answers)
    found.append((sum(a.tokens for a in answers) / seconds, offline))
  stats = engine.stats
  engine.stop()
  median = statistics.median
  return {
    "slots": slots,
    "tokens_per_second": median(online for online, _ in found),
    "sampler_tokens_per_second": median(offline for _, offline in found),
    "ratio": median(online / offline for online, offline in found),
    "calls_per_token": stats.row_calls / max(stats.tokens, 1),
    "compile_seconds": compiled,
  }


def arrivals(
  run: Run,
  sampler: SamplerConfig,
  *,
  slots: int = 8,
  prompt_tokens: int | None = None,
) -> dict[str, Any]:
  """Returns how long requests take that arrive at random, beside static batches.

  As many requests as slots come within the time that a batch of them takes, at
  times that a fixed seed draws. A server with static batches waits for the last of
  them, and then samples all at once.

  Args:
    run: this and what follows as of `saturated`.
    sampler: how to sample.
    slots: rows that run at once.
    prompt_tokens: random tokens before what is sampled.

  Returns:
    `seconds` and `static_seconds` from the first arrival to the last answer, their
    `ratio`, `first_seconds` and `answer_seconds` (medians from a request's arrival
    to its first tokens and to its last), `block_seconds` (a block of the batch's).
  """
  length = run.config.data.length
  rows = prompts(run, length, slots, prompt_tokens, False)
  once = lambda seed: run.sample_rows(
    rows, length=length, sampler=sampler, seed=seed
  )
  once(0)
  batch = statistics.median(once(seed).seconds for seed in (1, 2))
  drawn = np.random.default_rng(0).uniform(0.0, batch, slots - 1)
  at = [0.0, *np.sort(drawn).tolist()]
  engine = Engine.of(run, sampler=sampler, slots=slots, length=length)
  engine.start()
  answers = load(engine, rows, at)
  engine.stop()
  seconds = max(answer.last for answer in answers)
  static = at[-1] + batch
  median = statistics.median
  free = rows[0].count(None)
  block = engine.sampler.block_length or length
  return {
    "slots": slots,
    "seconds": seconds,
    "static_seconds": static,
    "ratio": seconds / static,
    "first_seconds": median(a.first - a.sent for a in answers),
    "answer_seconds": median(a.last - a.sent for a in answers),
    "block_seconds": batch / -(-free // block),
  }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns what was measured, for people."""
  lines = []
  if (found := results.get("saturated")) is not None:
    lines.append(
      f"saturated, {found['slots']} slots: "
      f"{found['tokens_per_second']:,.1f} tokens/s, "
      f"{found['ratio']:.2f} of the sampler's at that batch"
    )
  if (found := results.get("arrivals")) is not None:
    lines.append(
      f"{found['slots']} arrivals at random: {found['seconds']:.1f} s, "
      f"{found['ratio']:.2f} of static batches' {found['static_seconds']:.1f} s; "
      f"first tokens after {found['first_seconds']:.2f} s, a block of the "
      f"batch takes {found['block_seconds']:.2f} s"
    )
  return "\n".join(lines)

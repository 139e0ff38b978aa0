"""Measuring the engine: saturated, beside static batches, and behind HTTP.

`saturated` alternates the engine with the sampling program on the same requests;
`arrivals` lets requests come one by one, by a fixed schedule, and compares with a
server that waits until a batch is full; `over_http` alternates the engine with the
same requests as streams over loopback. All in one process, on one engine.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import http.client
import json
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
from dllm_jax.serving.http import application, Limits, Model, Server
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


def serve(
  run: Run,
  sampler: SamplerConfig,
  *,
  slots: int = 8,
  rounds: int = 3,
  waves: int = 2,
  prompt_tokens: int | None = None,
) -> dict[str, dict[str, Any]]:
  """Returns what `saturated`, `arrivals` and `over_http` find, by their names.

  Args:
    run: whose network; an untrained one is as fast as a trained one.
    sampler: how to sample.
    slots: rows that run at once, and of the sampler's batch.
    rounds: timed rounds of the programs that are compared, in turns.
    waves: requests a slot in each round.
    prompt_tokens: random tokens before what is sampled; None for a third of the
      canvas.
  """
  length = run.config.data.length
  rows = prompts(run, length, slots, prompt_tokens, False)
  engine = Engine.of(
    run, sampler=sampler, slots=slots, queue=waves * slots, length=length
  )
  compiled = engine.compile()

  def once(seed: int):
    return run.sample_rows(rows, length=length, sampler=sampler, seed=seed)

  once(0)
  engine.start()
  try:
    full = saturated(engine, rows * waves, once, rounds=rounds)
    return {
      "saturated": {"compile_seconds": compiled, **full},
      "arrivals": arrivals(engine, rows, once),
      "http": over_http(run, sampler, engine, rows * waves, rounds=rounds),
    }
  finally:
    engine.stop()


def saturated(
  engine: Engine,
  rows: Sequence[Template],
  once: Callable[[int], Any],
  *,
  rounds: int,
) -> dict[str, Any]:
  """Returns the engine's speed with all slots taken, beside the sampler's.

  Args:
    engine: a started one.
    rows: a template for each request.
    once: samples a batch of as many as there are slots, with a seed.
    rounds: timed rounds of both, in turns.

  Returns:
    `tokens_per_second` of the engine, `sampler_tokens_per_second` (medians),
    `ratio` (the median over rounds), `calls_per_token`.
  """
  found = []
  for seed in range(1, rounds + 1):
    sampled = once(seed)
    offline = sampled.new_tokens / sampled.seconds
    found.append((_rate(load(engine, rows, [0.0] * len(rows))), offline))
  stats = engine.stats
  median = statistics.median
  return {
    "slots": engine.slots,
    "tokens_per_second": median(online for online, _ in found),
    "sampler_tokens_per_second": median(offline for _, offline in found),
    "ratio": median(online / offline for online, offline in found),
    "calls_per_token": stats.row_calls / max(stats.tokens, 1),
  }


def arrivals(
  engine: Engine, rows: Sequence[Template], once: Callable[[int], Any]
) -> dict[str, Any]:
  """Returns how long requests take that arrive at random, beside static batches.

  They come within the time that a batch of them takes, at times that a fixed seed
  draws. A server with static batches waits for the last of them, and then samples
  all at once.

  Args:
    engine: a started one.
    rows: a template for each request, as many as slots.
    once: samples a batch of them, with a seed.

  Returns:
    `seconds` and `static_seconds` from the first arrival to the last answer, their
    `ratio`, `first_seconds` and `answer_seconds` (medians from a request's arrival
    to its first tokens and to its last), `alone_seconds` (to the first tokens of a
    request that is alone), `block_seconds` (a block of one that is alone),
    `batch_block_seconds` (a block of the batch's).
  """
  batch = statistics.median(once(seed).seconds for seed in (1, 2))
  drawn = np.random.default_rng(0).uniform(0.0, batch, len(rows) - 1)
  at = [0.0, *np.sort(drawn).tolist()]
  answers = load(engine, rows, at)
  (alone,) = load(engine, rows[:1], [0.0])
  seconds = max(answer.last for answer in answers)
  static = at[-1] + batch
  median = statistics.median
  width = engine.sampler.block_length or engine.sampler.length
  blocks = -(-rows[0].count(None) // width)
  return {
    "slots": engine.slots,
    "seconds": seconds,
    "static_seconds": static,
    "ratio": seconds / static,
    "first_seconds": median(a.first - a.sent for a in answers),
    "answer_seconds": median(a.last - a.sent for a in answers),
    "alone_seconds": alone.first - alone.sent,
    "block_seconds": (alone.last - alone.sent) / blocks,
    "batch_block_seconds": batch / blocks,
  }


def over_http(
  run: Run,
  sampler: SamplerConfig,
  engine: Engine,
  rows: Sequence[Template],
  *,
  rounds: int,
) -> dict[str, Any]:
  """Returns what HTTP, text and streams add to the time of a full engine.

  Clients on loopback, a thread for each slot in this very process, send their
  requests one after another and read each answer as a stream of pieces of text.

  Args:
    run: whose tokenizer.
    sampler: how the engine samples.
    engine: a started one.
    rows: a template for each request: a prompt and what follows it.
    rounds: timed rounds of both, in turns.

  Returns:
    `tokens_per_second`, `engine_tokens_per_second` (medians), and `overhead`, the
    median of the share by which requests over HTTP take longer.
  """
  found = []
  with _served(run, sampler, engine) as (address, name):
    for _ in range(rounds):
      bare = _rate(load(engine, rows, [0.0] * len(rows)))
      found.append((_streamed(address, name, rows, engine.slots), bare))
  median = statistics.median
  return {
    "slots": engine.slots,
    "tokens_per_second": median(streamed for streamed, _ in found),
    "engine_tokens_per_second": median(bare for _, bare in found),
    "overhead": median(bare / streamed - 1 for streamed, bare in found),
  }


@contextlib.contextmanager
def _served(run: Run, sampler: SamplerConfig, engine: Engine):
  """Yields the address at which an engine answers, and the model's name."""
  name, limits = "benchmark", Limits(choices=engine.slots)
  model = Model.of(run, engine, name=name, sampler=sampler, limits=limits)
  server = Server(application(model), host="127.0.0.1", port=0, limits=limits)
  thread = threading.Thread(target=server.run, name="server", daemon=True)
  thread.start()
  server.listening.wait()
  try:
    yield server.address, name
  finally:
    server.should_exit = True
    thread.join()


def _streamed(
  address: tuple[str, int], name: str, rows: Sequence[Template], clients: int
) -> float:
  """Returns tokens a second of requests that are read as streams."""
  counts, failed, begin = [], [], time.perf_counter()

  def ask(mine: Sequence[Template]) -> None:
    try:
      counts.extend(_read(address, name, row) for row in mine)
    except Exception as error:  # noqa: BLE001  Told by the main thread.
      failed.append(error)

  threads = [
    threading.Thread(target=ask, args=(rows[at::clients],))
    for at in range(clients)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  if failed:
    raise failed[0]
  return sum(counts) / (time.perf_counter() - begin)


def _read(address: tuple[str, int], name: str, row: Template) -> int:
  """Returns how many tokens a streamed answer has, by its usage."""
  given = row.index(None)
  body = {
    "model": name,
    "prompt": list(row[:given]),
    "max_tokens": len(row) - given,
    "stream": True,
    "stream_options": {"include_usage": True},
  }
  with contextlib.closing(http.client.HTTPConnection(*address)) as connection:
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    answer = connection.getresponse()
    if answer.status != 200:
      raise RuntimeError(f"a request was not answered: {answer.read(1000)!r}")
    usage = None
    for line in answer:
      if line.startswith(b"data: {"):
        usage = json.loads(line[6:]).get("usage") or usage
  return usage["completion_tokens"]


def _rate(answers: Sequence[Answer]) -> float:
  """Returns tokens a second, from the first request to the last answer."""
  seconds = max(answer.last for answer in answers)
  return sum(answer.tokens for answer in answers) / seconds


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns what was measured, for people."""
  full, came, web = (results[k] for k in ("saturated", "arrivals", "http"))
  return "\n".join((
    f"saturated, {full['slots']} slots: {full['tokens_per_second']:,.1f} "
    f"tokens/s, {full['ratio']:.2f} of the sampler's at that batch",
    f"{came['slots']} arrivals at random: {came['seconds']:.1f} s, "
    f"{came['ratio']:.2f} of static batches' {came['static_seconds']:.1f} s; "
    f"first tokens after {came['first_seconds']:.2f} s",
    f"alone: first tokens after {came['alone_seconds']:.2f} s, a block takes "
    f"{came['block_seconds']:.2f} s, {came['batch_block_seconds']:.2f} s in a "
    "batch",
    f"streams over HTTP: {web['tokens_per_second']:,.1f} tokens/s, "
    f"{100 * web['overhead']:.1f} % more time",
  ))

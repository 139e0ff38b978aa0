"""What `/metrics` says: the engine's counts, and times as clients saw them."""

from collections.abc import Iterator
import time

import prometheus_client
from prometheus_client import core

from dllm_jax.serving.engine import Engine
from dllm_jax.serving.http.answer import Answer

ROUTES = (
  "/v1/completions",
  "/v1/chat/completions",
  "/tokenize",
  "/detokenize",
)
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
_CALLS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0)
_FORGETS = 0.2  # the share of the newest answer in the mean


class Metrics:
  """Counters of one server.

  Args:
    engine: whose counts are told.
  """

  def __init__(self, engine: Engine):
    self._engine = engine
    self._mean = 1.0  # seconds of an answer
    self._registry = prometheus_client.CollectorRegistry()
    self._registry.register(_EngineCounts(engine))
    made = {"registry": self._registry}
    self._requests = prometheus_client.Counter(
      "dllm_requests",
      "Texts asked for, and whatever was refused.",
      ["route", "status"],
      **made,
    )
    self._first = prometheus_client.Histogram(
      "dllm_time_to_first_token_seconds",
      "From a request to the first text of an answer.",
      buckets=_SECONDS,
      **made,
    )
    self._latency = prometheus_client.Histogram(
      "dllm_request_seconds",
      "From a request to the end of its answers.",
      buckets=_SECONDS,
      **made,
    )
    self._calls = prometheus_client.Histogram(
      "dllm_calls_per_token",
      "Network calls of an answer by its tokens.",
      buckets=_CALLS,
      **made,
    )

  def answered(self, route: str, status: int) -> None:
    """Counts a request; paths that are none of the routes count together."""
    route = route if route in ROUTES else "other"
    self._requests.labels(route, status).inc()

  def took(self, answers: list[Answer], since: float) -> None:
    """Counts the times of answers that are over.

    Args:
      answers: of one request.
      since: when it came, `time.monotonic`.
    """
    seconds = time.monotonic() - since
    self._mean += _FORGETS * (seconds - self._mean)
    self._latency.observe(seconds)
    for answer in answers:
      if answer.first is not None:
        self._first.observe(answer.first - since)
      if answer.tokens and answer.usage is not None:
        self._calls.observe(answer.usage.calls / answer.tokens)

  def retry_after(self) -> int:
    """Returns the whole seconds after which the queue may have room."""
    stats = self._engine.stats
    rounds = (stats.waiting + 1) / max(stats.slots, 1)
    return max(1, min(60, round(rounds * self._mean)))

  def text(self) -> bytes:
    """Returns all of it in Prometheus' format."""
    return prometheus_client.generate_latest(self._registry)


class _EngineCounts:
  """The engine's counts, read when they are asked for."""

  def __init__(self, engine: Engine):
    self._engine = engine

  def collect(self) -> Iterator[core.Metric]:
    """Yields the engine's counts."""
    stats = self._engine.stats
    for name, text, value in (
      ("dllm_slots", "Rows that can run at once.", stats.slots),
      ("dllm_slots_running", "Rows that run.", stats.running),
      ("dllm_queue_requests", "Rows that wait.", stats.waiting),
    ):
      yield core.GaugeMetricFamily(name, text, value=value)
    for name, text, value in (
      ("dllm_tokens", "Tokens committed.", stats.tokens),
      ("dllm_prompt_tokens", "Tokens given.", stats.prompt_tokens),
      ("dllm_cached_tokens", "Given tokens not computed again.",
       stats.cached_tokens),
      ("dllm_network_calls", "Network calls, of all rows at once.",
       stats.calls),
      ("dllm_row_calls", "The same, for each row in them.", stats.row_calls),
    ):  # fmt: skip
      yield core.CounterMetricFamily(name, text, value=value)
    rows = core.CounterMetricFamily(
      "dllm_rows", "Rows that are over.", labels=["reason"]
    )
    for reason, count in stats.finished.items():
      rows.add_metric([reason], count)
    yield rows

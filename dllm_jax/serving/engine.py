"""The engine: one thread that owns the device, and rows that join and leave it.

    engine = Engine.of(run, sampler=SamplerConfig(preset="llada"), slots=8)
    engine.start()                      # compiles first, then `ready`
    ticket = engine.submit(Request(template=(5, 7, None, None)), listener)
    ticket.cancel()
    engine.stop(deadline=30.0)          # lets those that run finish

A round of the thread: rows that were cancelled leave, those that wait join, one
`advance` of the slots' program (`slots`), events to the listeners.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from dllm_jax.run.run import Run
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.sampling.sampler import Sampler
from dllm_jax.serving.requests import Listener, Request


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stats:
  """Counts since the engine was made, and what is going on now.

  Attributes:
    slots: rows that can run at once.
    running: rows that do now.
    waiting: requests in the queue.
    finished: rows that are over, by reason.
    tokens: that were committed.
    prompt_tokens: that were given.
    cached_tokens: of them, those whose keys and values were there.
    calls: network calls, each of which serves all rows.
    row_calls: the same, counted for each row that took part.
  """

  slots: int
  running: int
  waiting: int
  finished: Mapping[str, int]
  tokens: int
  prompt_tokens: int
  cached_tokens: int
  calls: int
  row_calls: int


class Ticket:
  """What a caller holds of a request that was taken."""

  def cancel(self) -> None:
    """Lets the row leave before the next network call; from any thread.

    `Finished(reason="cancelled")` follows, unless the row is over already.
    """
    raise NotImplementedError


class Engine:
  """Serves requests from a fixed number of slots.

  Attributes:
    sampler: how it samples, on a canvas of `sampler.length` slots.
    slots: rows that run at once.
    queue: requests that may wait.
  """

  sampler: Sampler
  slots: int
  queue: int

  @classmethod
  def of(
    cls,
    run: Run,
    *,
    sampler: SamplerConfig | None = None,
    slots: int = 8,
    length: int | None = None,
    queue: int = 64,
    calls: int = 1,
    state: Any = None,
    use_ema: bool = True,
  ) -> "Engine":
    """Returns the engine of a run's network, on its mesh.

    Args:
      run: whose network.
      sampler: how to sample; by default as configured.
      slots: rows that run at once.
      length: slots of a row's canvas, prompt and all; by default the training
        length.
      queue: requests that may wait; more are refused.
      calls: network calls between two looks at what came of them, at most: 1
        streams, joins and leaves at each call, more spares the host.
      state: whose parameters; by default the newest checkpoint's.
      use_ema: whether to use averaged parameters where there are any.

    Raises:
      ValueError: the sampler is illegal, or there is no slot.
    """
    raise NotImplementedError

  @property
  def ready(self) -> bool:
    """Whether all programs are compiled and the thread serves."""
    raise NotImplementedError

  @property
  def stats(self) -> Stats:
    """What was served so far; from any thread."""
    raise NotImplementedError

  def compile(self) -> float:
    """Compiles all programs; returns the seconds it took, 0 if they are."""
    raise NotImplementedError

  def start(self) -> None:
    """Compiles, then starts the thread; returns when it is ready.

    On several processes each calls it; all but process 0 return from `serve`
    when process 0 stops.
    """
    raise NotImplementedError

  def stop(self, deadline: float = 0.0) -> None:
    """Takes no more requests, and ends the thread.

    Those that wait are finished as cancelled, those that run too, unless they
    are over within the deadline.

    Args:
      deadline: seconds.
    """
    raise NotImplementedError

  def check(self, request: Request) -> None:
    """Raises ValueError, for people to read, unless the request can be served.

    Raises:
      ValueError: it is longer than the canvas, has nothing to sample, or has a
        token that is none, or the mask.
    """
    raise NotImplementedError

  def submit(self, request: Request, listener: Listener) -> Ticket:
    """Takes a request; from any thread.

    Args:
      request: what is wanted.
      listener: hears of it, from the engine's thread, maybe before this returns.

    Raises:
      ValueError: as `check`.
      Full: as many as may wait already do.
      Closed: the engine does not serve.
    """
    raise NotImplementedError

"""The engine: one thread that owns the device, and rows that join and leave it.

    engine = Engine.of(run, sampler=SamplerConfig(preset="llada"), slots=8)
    engine.start()                      # compiles first, then `ready`
    ticket = engine.submit(Request(template=(5, 7, None, None)), listener)
    ticket.cancel()
    engine.stop(deadline=30.0)          # lets those that run finish

A round of the thread: rows that were cancelled leave, those that wait join, one
`advance` of the slots' program (`slots`), events to the listeners.
"""

import collections
from collections.abc import Mapping
import dataclasses
import logging
import threading
import time
from typing import Any

from dllm_jax.parallel import distributed
from dllm_jax.run.run import Run
from dllm_jax.sampling import requests
from dllm_jax.sampling.constraints.arrays import Room
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.serving.launch import Program, Progress
from dllm_jax.serving.requests import Closed, Full, Listener, Request
from dllm_jax.serving.scheduler import canvas_of, Scheduler, Ticket

_LOG = logging.getLogger(__name__)
_BEAT_SECONDS = 60.0  # other processes hear of process 0 at least so often


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
    calls: rounds of network calls, each of which serves all rows.
    row_calls: network calls, counted for each row that took part.
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


class Engine:
  """Serves requests from a fixed number of slots.

  Attributes:
    sampler: how text is sampled, on a canvas of `sampler.length` slots.
    slots: rows that run at once.
    queue: requests that may wait.
  """

  def __init__(self, program: Program, *, queue: int = 64, calls: int = 1):
    """Makes an engine of compiled programs; see `of`."""
    if queue < 0 or calls < 1:
      raise ValueError(
        "the queue holds 0 requests or more, and rows are looked at after 1 call"
        f" or more, not {queue} and {calls}"
      )
    self.sampler, self.slots, self.queue = program.sampler, program.rows, queue
    self._program = program
    self._scheduler = Scheduler(program, calls=calls)
    self._changed = threading.Condition()
    self._waiting: collections.deque[Ticket] = collections.deque()
    self._thread: threading.Thread | None = None
    self._open, self._compiled, self._until = False, False, None

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
    top: int = 0,
    state: Any = None,
    use_ema: bool = True,
    languages: int = 0,
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
      top: likeliest tokens that are told with each token.
      state: whose parameters; by default the newest checkpoint's.
      use_ema: whether to use averaged parameters where there are any.
      languages: states of the largest language that a row may choose; 0 for no
        languages.

    Raises:
      ValueError: the sampler is illegal, or there is no slot.
    """
    sampler, ends = sampler or run.config.sampler, run.tokenizer.end_ids
    length = length or run.config.data.length
    length += requests.spare(run.objective)
    built = sampler.build(run.objective, length=length, end_ids=ends, top=top)
    state = run.state if state is None else state
    params = state.eval_params if use_ema else state.params
    program = Program(
      built,
      run.denoiser,
      params["model"],
      state.process.replace(params=params["process"]),
      defaults=sampler.options(ends),
      end_ids=ends,
      rows=slots,
      mesh=run.mesh,
      room=Room.for_states(languages, run.objective.vocab_size)
      if languages
      else None,
    )
    return cls(program, queue=queue, calls=calls)

  @property
  def ready(self) -> bool:
    """Whether all programs are compiled and requests are taken."""
    return self._open and self._compiled

  @property
  def stats(self) -> Stats:
    """What was served so far; from any thread."""
    scheduler = self._scheduler
    names = "tokens", "prompt_tokens", "cached_tokens", "calls", "row_calls"
    return Stats(
      slots=self.slots,
      running=len(scheduler.running),
      waiting=len(self._waiting),
      finished=dict(scheduler.finished),
      **{name: scheduler.counts[name] for name in names},
    )

  def compile(self, before: Progress = lambda number, count: None) -> float:
    """Compiles all programs; returns the seconds it took, 0 if they are.

    Args:
      before: as of `Program.compile`.
    """
    if self._compiled:
      return 0.0
    seconds = self._program.compile(before)
    self._compiled = True
    return seconds

  def start(self, before: Progress = lambda number, count: None) -> None:
    """Compiles, then starts the thread; returns when it is ready.

    On several processes each calls it, and process 0 alone is given requests;
    the others wait in `join` for its end.

    Args:
      before: as of `Program.compile`.
    """
    if self._thread is not None:
      raise ValueError("the engine was started before: make a new one")
    self.compile(before)
    self._open = distributed.index() == 0
    self._thread = threading.Thread(
      target=self._serve, name="engine", daemon=True
    )
    self._thread.start()

  def stop(self, deadline: float = 0.0) -> None:
    """Takes no more requests, and ends the thread.

    Requests that were taken go on until the deadline, and are then cancelled.

    Args:
      deadline: seconds.
    """
    with self._changed:
      self._open, self._until = False, time.monotonic() + deadline
      self._changed.notify_all()
    self.join()

  def join(self) -> None:
    """Waits for the end of the thread."""
    if self._thread is not None:
      self._thread.join()

  def check(self, request: Request) -> None:
    """Says whether a request can be served, before it is.

    Raises:
      ValueError: it is longer than the canvas, has nothing to sample, has a token
        that is none, or the mask, or chooses what the sampler cannot heed; for
        people to read.
    """
    canvas = canvas_of(request, self.sampler)
    self._program.arrays(canvas, request.number, request.options)

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
    self.check(request)
    ticket = Ticket(request, listener, self._wake)
    with self._changed:
      if not self.ready:
        raise Closed("the engine is not serving")
      most = self.queue + self.slots - len(self._scheduler.running)
      if len(self._waiting) >= most:
        raise Full(f"{len(self._waiting)} requests wait already")
      self._waiting.append(ticket)
      self._changed.notify_all()
    return ticket

  def _wake(self) -> None:
    with self._changed:
      self._changed.notify_all()

  def _serve(self) -> None:
    """Makes plans and follows them, until the last."""
    scheduler = self._scheduler
    while True:
      mine = self._plan() if distributed.index() == 0 else None
      plan = distributed.exchange(mine)[0]
      if plan is None:
        return
      try:
        view = scheduler.follow(plan)
      except Exception:  # pylint: disable=broad-except
        _LOG.exception("a network call failed; its rows are given up")
        scheduler.give_up()
      else:
        scheduler.tell(view)

  def _plan(self) -> dict[str, Any] | None:
    """Returns what to do next, once there is something; None to end."""
    scheduler = self._scheduler
    several = distributed.store() is not None
    with self._changed:
      while not (self._waiting or scheduler.running):
        if self._until is not None:
          return None
        if not self._changed.wait(_BEAT_SECONDS if several else None):
          break  # so that nobody's patience ends
      late = self._until is not None and time.monotonic() > self._until
      gone = [t for t in self._waiting if t.cancelled or late]
      kept = [t for t in self._waiting if t not in gone]
      self._waiting = collections.deque(kept)
    scheduler.cancel(every=late)
    with self._changed:
      count = min(len(scheduler.free), len(self._waiting))
      joining = [self._waiting.popleft() for _ in range(count)]
    for ticket in gone:
      scheduler.drop(ticket)
    return scheduler.plan(joining)

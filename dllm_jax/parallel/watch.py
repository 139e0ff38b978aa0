"""The end of a process whose job has stopped, with a line that says why.

A process that waits in a collective for one that died, hangs or was stopped
would wait for ever. Each process of a job therefore has two threads. One writes
every few seconds to the job's key-value store where its main thread is; the
other judges, and ends the process so that a launcher can start all again:

- process 0 ends the job when it has not heard of a process for a while, or when
  its own main thread has got no further for a long while; then it names the
  processes that are behind;
- the others end when process 0 does not answer, or has said that it is over.

A process on its own is watched for getting no further.
"""

import collections
from collections.abc import Callable
import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time

from dllm_jax.parallel import distributed

_PLACES = "dllm/watch/places/"
_VERDICT = "dllm/watch/verdict/"
_NAMED = 4  # processes in a message
_AGAIN = "; start all processes again: they continue from the last checkpoint"


def _exit(message: str) -> None:
  print(f"dllm: {message}", file=sys.stderr, flush=True)
  os._exit(1)  # The main thread does not listen.


class Watch:
  """Watches a main thread, and the other processes of its job.

  Use it as a context manager, and call `at` wherever the main thread gets
  further.
  """

  def __init__(
    self,
    *,
    hang_seconds: float,
    heartbeat_seconds: float,
    end: Callable[[str], None] = _exit,
  ):
    """Prepares to watch.

    Args:
      hang_seconds: how long the main thread may stay at one place.
      heartbeat_seconds: how long a process may be silent.
      end: ends the process with a message.
    """
    self._hang, self._silence, self._end = (
      hang_seconds,
      heartbeat_seconds,
      end,
    )
    self._store = distributed.store()
    self._index, self._name = distributed.index(), distributed.name()
    shortest = hang_seconds if self._store is None else heartbeat_seconds
    self._interval = min(max(shortest / 8, 0.05), 10.0)
    self._stopped = threading.Event()
    self._talker = threading.Thread(target=self._talk_often, daemon=True)
    self._place = (0, "starting")
    self._moved = self._answered = time.monotonic()
    # What each process said last, and when that was new, by this clock.
    self._heard: dict[int, tuple[dict, float]] = {}
    self._verdict: str | None = None

  def at(self, step: int, doing: str) -> None:
    """Says where the main thread is: after a step, and what it does next."""
    self._place, self._moved = (step, doing), time.monotonic()

  def __enter__(self) -> "Watch":
    self.at(0, "starting")
    threading.Thread(target=self._judge_often, daemon=True).start()
    if self._store is not None:
      self._talker.start()
    return self

  def __exit__(self, kind, error, trace) -> None:
    self._stopped.set()
    if self._store is None:
      return
    # Its last word must not come after ours.
    self._talker.join(self._silence)
    if error is None:
      with contextlib.suppress(Exception):  # Process 0 may be gone already.
        self._say(done=True)
    else:
      text = " ".join(f"{kind.__name__}: {error}".split())[:300]
      self._pronounce(f"{self._name} failed ({text})")

  # ---------------------------------------------------------------- talking

  def _talk_often(self) -> None:
    while not self._stopped.is_set():
      try:
        self._say()
        over = self._store.key_value_dir_get(_VERDICT)
        if self._index == 0:
          self._hear()
      except Exception:  # pylint: disable=broad-except
        pass  # Whoever judges sees how long there was no answer.
      else:
        self._answered = time.monotonic()
        if over:
          self._verdict = over[0][1]
      self._stopped.wait(self._interval)

  def _say(self, *, done: bool = False) -> None:
    step, doing = self._place
    said = {
      "host": socket.gethostname(),
      "step": step,
      "doing": doing,
      "done": done,
      "time": time.monotonic(),  # makes each message another one
    }
    self._store.key_value_set(f"{_PLACES}{self._index}", json.dumps(said), True)

  def _hear(self) -> None:
    now = time.monotonic()
    for key, value in self._store.key_value_dir_get(_PLACES):
      process, said = int(key.rsplit("/", 1)[1]), json.loads(value)
      if process not in self._heard or self._heard[process][0] != said:
        self._heard[process] = said, now

  def _pronounce(self, verdict: str) -> None:
    # Another may have been first, or nobody listens any more.
    with contextlib.suppress(Exception):
      self._store.key_value_set(f"{_VERDICT}0", verdict)

  # ---------------------------------------------------------------- judging

  def _judge_often(self) -> None:
    before = time.monotonic()
    while not self._stopped.wait(self._interval):
      now = time.monotonic()
      if now - before > 2 * self._interval + 1:
        self._forgive(now)  # This process was itself stopped for a while.
      before = now
      if (verdict := self._judge(now)) and not self._stopped.is_set():
        if self._store is not None and self._index == 0:
          self._pronounce(verdict)
          time.sleep(2 * self._interval)  # so that the others read it
        self._end(verdict + _AGAIN)
        return

  def _forgive(self, now: float) -> None:
    self._moved = self._answered = now
    self._heard = {p: (said, now) for p, (said, _) in self._heard.items()}

  def _judge(self, now: float) -> str | None:
    """Returns why the job is over, or None."""
    if self._verdict is not None:
      return self._verdict
    if now - self._answered > self._silence and self._store is not None:
      return (
        f"process 0, which coordinates, has not answered "
        f"{self._name} for {self._silence:g} s"
      )
    for process, (said, when) in sorted(self._heard.items()):
      if now - when > self._silence and not said["done"]:
        return (
          f"{_place(process, said)} and has not been heard of for "
          f"{self._silence:g} s"
        )
    # Process 0 knows where all are: it is to speak first.
    if now - self._moved > self._hang * (1.5 if self._index else 1.0):
      faulthandler.dump_traceback(file=sys.stderr)
      step, doing = self._place
      return (
        f"no progress for {self._hang:g} s (training.hang_seconds) after step "
        f"{step} while {doing}" + self._behind()
      )
    return None

  def _behind(self) -> str:
    """Returns which processes are elsewhere than most."""
    places = {p: (s["step"], s["doing"]) for p, (s, _) in self._heard.items()}
    if len(places) < 2:
      return ""
    (most, count), *_ = collections.Counter(places.values()).most_common()
    odd = sorted((at, p) for p, at in places.items() if at != most)[:_NAMED]
    if not odd:
      return f", like all {count} processes"
    named = "; ".join(_place(p, self._heard[p][0]) for _, p in odd)
    return f": {named}; {count} others after step {most[0]} are {most[1]}"


def _place(process: int, said: dict) -> str:
  named = distributed.name(process, said["host"])
  return f"{named} was {said['doing']} after step {said['step']}"

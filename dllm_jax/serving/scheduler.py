"""The scheduler: who is in which row, what a round does, and what came of it.

What a round does to the device is a plan, numbers and lists, which process 0 makes
and all processes of a job follow. One thread uses a scheduler: the engine's.
"""

import collections
from collections.abc import Mapping
import dataclasses
import logging
from typing import Any

from dllm_jax.sampling import requests
from dllm_jax.sampling.options import RowOptions
from dllm_jax.sampling.sampler import Sampler
from dllm_jax.serving.admission import Admission
from dllm_jax.serving.launch import Program
from dllm_jax.serving.requests import (
  Event,
  Finished,
  Listener,
  Reason,
  Request,
  Usage,
)
from dllm_jax.serving.rows import Row
from dllm_jax.serving.slots import View

_LOG = logging.getLogger(__name__)


class Ticket:
  """What a caller holds of a request that was taken.

  Attributes:
    request: what was asked for.
    cancelled: whether it is wanted no more.
  """

  def __init__(self, request: Request, listener: Listener, wake: Any):
    self.request, self.cancelled = request, False
    self._listener, self._wake = listener, wake

  def cancel(self) -> None:
    """Lets the row leave before the next network call; from any thread.

    `Finished(reason="cancelled")` follows, unless the row is over already.
    """
    self.cancelled = True
    self._wake()

  def tell(self, event: Event) -> None:
    """Hands an event to the listener; a listener that fails is no one else's."""
    try:
      self._listener(event)
    except Exception:  # pylint: disable=broad-except
      _LOG.exception("a listener failed; its request is cancelled")
      self.cancelled = True


def canvas_of(request: Request, sampler: Sampler) -> list[int | None]:
  """Returns a request's template behind what a canvas begins with.

  Raises:
    ValueError: it does not fit, or nothing is to be sampled.
  """
  canvas = requests.begun(request.template, sampler.objective)
  length = sampler.length - requests.spare(sampler.objective)
  if len(canvas) > length:
    raise ValueError(
      f"the request needs {len(canvas)} slots, prompt and new tokens together,"
      f" {len(canvas) - length} more than the {length} that a row has here:"
      " shorten the prompt, or ask for fewer tokens"
    )
  if None not in canvas:
    raise ValueError("nothing to sample: ask for at least 1 new token")
  gap = any(token is not None for token in canvas[canvas.index(None) :])
  if gap and sampler.cache == "block" and sampler.objective.shift:
    raise ValueError(
      "an autoregressive network does not see what follows a gap, and fills none:"
      " give a prompt and nothing after it"
    )
  return canvas


class Scheduler:
  """Rows and who is in them.

  Attributes:
    running: tickets and what is known of their rows, by row.
    counts: tokens, prompt_tokens, cached_tokens, calls, row_calls so far.
    finished: rows that are over, by reason.
  """

  def __init__(self, program: Program, *, calls: int):
    self._program, self._calls = program, calls
    self._sampler = program.sampler
    self.running: dict[int, tuple[Ticket, Row]] = {}
    self.counts, self.finished = collections.Counter(), collections.Counter()
    self._forget()

  def _forget(self) -> None:
    self._total = 0
    self._loose: set[int] = set()  # whose canvas the device would go on with
    self._admission = Admission(
      self._sampler, rows=self._program.rows, widths=self._program.widths
    )

  @property
  def free(self) -> list[int]:
    """The rows that nobody has."""
    return [r for r in range(self._program.rows) if r not in self.running]

  def cancel(self, every: bool = False) -> None:
    """Lets the rows go whose tickets are cancelled, or every one."""
    for at, (ticket, _) in list(self.running.items()):
      if every or ticket.cancelled:
        self._leave(at, "cancelled")
        self._loose.add(at)

  def plan(self, joining: list[Ticket]) -> dict[str, Any]:
    """Returns what the next round does, as numbers and lists.

    Args:
      joining: requests that get a row, no more than are free.
    """
    joined = [self._join(ticket) for ticket in joining]
    self._loose -= {place["row"] for place, *_ in joined}
    moved = self._moves()
    freed, self._loose = sorted(self._loose), set()
    most = max(self.running, default=0)
    rows = next(count for count in self._program.counts if count > most)
    return {"joined": joined, "moved": moved, "freed": freed, "rows": rows}

  def _moves(self) -> list[tuple[int, int]]:
    """Moves rows to the front, where fewer rows can then be computed."""
    counts, moved = self._program.counts, []
    enough = next(n for n in counts if n >= max(len(self.running), 1))
    for row in sorted(r for r in self.running if r >= enough):
      to = min(self.free)
      self.running[to] = self.running.pop(row)
      self._admission.moved(row, to)
      self._loose.discard(to)
      self._loose.add(row)
      moved.append((row, to))
    return moved

  def _join(self, ticket: Ticket) -> tuple:
    request = ticket.request
    canvas = canvas_of(request, self._sampler)
    place = self._admission.place(canvas, self.free)
    row = Row(
      canvas,
      before=len(canvas) - len(request.template),
      ends=self._program.ends(request.options),
      mask_id=self._sampler.objective.mask_id,
      cached=place.start,
    )
    self.running[place.row] = ticket, row
    return (
      dataclasses.asdict(place),
      canvas,
      request.number,
      request.options.given,
    )

  def follow(self, plan: dict[str, Any]) -> View:
    """Does what a plan says, on every process alike, and then network calls."""
    program = self._program
    for place, canvas, number, given in plan["joined"]:
      given = {name: _as_given(value) for name, value in given.items()}
      arrays = program.arrays(canvas, number, RowOptions(**given))
      program.admit(arrays, **place)
    for source, row in plan["moved"]:
      program.move(source, row)
    for row in plan["freed"]:  # and its cache is left as it is
      program.admit(program.blank, row=row, start=self._sampler.length)
    return program.advance(plan["rows"], self._calls)

  def tell(self, view: View) -> None:
    """Tells what came of network calls, and lets rows go that are over."""
    self.counts["calls"] += int(view.total) - self._total
    self._total = int(view.total)
    for at, (ticket, row) in list(self.running.items()):
      if not view.sound[at]:
        self._admission.keeps(at, ())
        self._loose.add(at)
        self._leave(at, "failed")
        continue
      tokens, log_probs, tops = view.tokens[at], view.log_prob[at], None
      if view.top_ids is not None:
        tops = view.top_ids[at], view.top_log_probs[at]
      if self._program.widths:
        self._admission.keeps(at, tokens[: view.kept[at]].tolist())
      before = row.usage
      found = row.committed(
        tokens, view.final[at], log_probs, tops, view.calls[at]
      )
      after = row.usage
      self.counts["tokens"] += after.completion - before.completion
      self.counts["row_calls"] += after.calls - before.calls
      if found is not None:
        ticket.tell(found)
      if ticket.request.drafts:
        ticket.tell(row.draft(tokens, log_probs))
      if row.over:
        self._leave(at, "stop" if row.ended else "length")
        if not view.over[at]:
          self._loose.add(at)

  def give_up(self) -> None:
    """Lets all rows go as failed, and begins with fresh ones."""
    for at in list(self.running):
      self._leave(at, "failed")
    self._program.reset()
    self._forget()

  def drop(self, ticket: Ticket) -> None:
    """Says that a request without a row is cancelled."""
    given = sum(token is not None for token in ticket.request.template)
    self._over(ticket, "cancelled", Usage(prompt=given, completion=0))

  def _leave(self, at: int, reason: Reason) -> None:
    ticket, row = self.running.pop(at)
    self._over(ticket, reason, row.usage)

  def _over(self, ticket: Ticket, reason: Reason, usage: Usage) -> None:
    self.finished[reason] += 1
    self.counts["prompt_tokens"] += usage.prompt
    self.counts["cached_tokens"] += usage.cached
    ticket.tell(Finished(reason=reason, usage=usage))


def _as_given(value: Any) -> Any:
  """Returns what a request chose as it was before it was sent as JSON."""
  if isinstance(value, Mapping):
    return {int(token): bias for token, bias in value.items()}
  return value

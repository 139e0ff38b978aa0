"""One answer as it comes: events of the engine to text, log-probabilities, end.

What is not yet sent waits here, as one piece of text and the newest draft: a
reader that is slow gets larger pieces and fewer drafts, and holds no more memory
than its own answer takes.
"""

from collections.abc import Callable, Sequence
import dataclasses
import time
from typing import Literal

from dllm_jax.serving.http.model import Model
from dllm_jax.serving.http.text import Detokenizer, Stops
from dllm_jax.serving.http.wishes import Wish, Wishes
from dllm_jax.serving.requests import (
  Committed,
  Draft,
  Event,
  Finished,
  Usage,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Token:
  """A token of an answer.

  Attributes:
    id: which.
    log_prob: at the call that committed it, nats; None where it was given.
    offset: characters of the answer before it.
    best: the best tokens of that call with their log-probabilities.
  """

  id: int
  log_prob: float | None
  offset: int
  best: Sequence[tuple[int, float]] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
  """What an answer has more than was taken.

  Attributes:
    text: that is final.
    tokens: that begin in it.
    draft: the newest canvas, or None.
    finish: how the answer ended, with its last piece.
  """

  text: str
  tokens: Sequence[Token] = ()
  draft: Draft | None = None
  finish: Literal["stop", "length", "failed"] | None = None


class Answer:
  """One choice of a response; hears events in the server's own thread.

  Args:
    wish: what is wanted.
    wishes: what all of its request is.
    model: what writes.
    changed: called when there is something to take.

  Attributes:
    wish: as given.
    usage: what the row cost; None until it is over.
    tokens: that were written, up to what ended them.
    first: when the first text came, `time.monotonic`; None before.
  """

  def __init__(
    self,
    wish: Wish,
    wishes: Wishes,
    model: Model,
    changed: Callable[[], None],
  ):
    self.wish, self._changed = wish, changed
    self._detokenizer = Detokenizer(model.tokenizer, wish.before)
    self._stops = Stops(wishes.stops)
    self._logprobs = wishes.logprobs is not None
    self._ticket = None
    self._draft: Draft | None = None
    self._text, self._length = wish.head, 0
    self._waiting: list[Token] = []
    self._decoded = 0
    self._finish = None
    self.tokens = 0
    self.usage: Usage | None = None
    self.first: float | None = None

  def holds(self, ticket) -> None:
    """Keeps the engine's ticket, to cancel it."""
    self._ticket = ticket
    if self._stops.found:
      ticket.cancel()

  def cancel(self) -> None:
    """Frees the engine's slot, if it is still held."""
    if self._ticket is not None and self.usage is None:
      self._ticket.cancel()

  @property
  def over(self) -> bool:
    """Whether nothing comes any more."""
    return self.usage is not None

  def hear(self, event: Event) -> None:
    """Takes an event of the engine's."""
    if isinstance(event, Finished):
      self._end(event)
    elif isinstance(event, Draft):
      self._draft = event
    else:
      self._write(event)
    self._changed()

  def _write(self, event: Committed) -> None:
    for slot, token, log_prob, best in zip(
      event.slots, event.tokens, event.log_probs, event.tops, strict=True
    ):
      if slot > self.wish.last or self._stops.found:
        break
      self.tokens += log_prob is not None
      if self._logprobs:
        self._waiting.append(
          Token(id=token, log_prob=log_prob, offset=self._decoded, best=best)
        )
      piece = self._detokenizer.add([token])
      self._decoded += len(piece)
      self._give(self._stops.add(piece))
    if self._stops.found and self._ticket is not None:
      self._ticket.cancel()

  def _give(self, text: str) -> None:
    self._text += text
    self._length += len(text)
    if text and self.first is None:
      self.first = time.monotonic()

  def _end(self, event: Finished) -> None:
    reason = event.reason
    if not self._stops.found and reason in ("stop", "length"):
      self._give(self._stops.add(self._detokenizer.finish(), last=True))
    if self._stops.found:
      reason = "stop"
    self._text += self.wish.tail
    self._finish = reason if reason in ("stop", "length") else "failed"
    self.usage = event.usage

  def take(self) -> Piece | None:
    """Returns what is new, or None."""
    finish, self._finish = self._finish, None
    draft, self._draft = self._draft, None
    text, self._text = self._text, ""
    if not (text or draft or finish):
      return None
    sent = [t for t in self._waiting if t.offset < self._length]
    if finish == "length" or (finish == "stop" and not self._stops.found):
      sent = self._waiting  # those without a character of their own, too
    self._waiting = [] if finish else self._waiting[len(sent) :]
    return Piece(text=text, tokens=sent, draft=draft, finish=finish)

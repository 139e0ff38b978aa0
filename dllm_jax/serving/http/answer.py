"""One answer as it comes: events of the engine to text, log-probabilities, end.

What is not yet sent waits here, as one piece of text and the newest draft: a
reader that is slow gets larger pieces and fewer drafts, and holds no more memory
than its own answer takes.
"""

from collections.abc import Callable, Sequence
import dataclasses
import time
from typing import Literal

from dllm_jax.evaluation.likelihood.reading import Reading
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
    best: the best tokens of that call with their log-probabilities; None for
      the first token of a text, before which there is nothing to say it by.
  """

  id: int
  log_prob: float | None
  offset: int
  best: Sequence[tuple[int, float]] | None = ()


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
    told: the tokens of the prompt, where they are shown.

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
    told: Sequence[Token] = (),
  ):
    self.wish, self._changed = wish, changed
    self._detokenizer = Detokenizer(model.tokenizer, wish.before)
    self._stops = Stops(wishes.stops)
    self._logprobs = wishes.logprobs is not None
    self._ticket = None
    self._draft: Draft | None = None
    # Offsets of tokens count what is echoed where its tokens are told.
    before = len(wish.head) if wishes.reads else 0
    self._text, self._length, self._decoded = wish.head, before, before
    self._told, self._waiting = list(told), []
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
    sent, self._told = [*self._told, *sent], []
    return Piece(text=text, tokens=sent, draft=draft, finish=finish)


def told(wish: Wish, reading: Reading, model: Model) -> list[Token]:
  """Returns the tokens of a prompt that was read.

  Args:
    wish: an answer to it.
    reading: what the network holds of it.
    model: what read it.
  """
  ids, read = wish.before, reading
  best = [
    tuple(zip(*pair, strict=True))
    for pair in zip(
      read.top_ids.tolist(), read.top_log_probs.tolist(), strict=True
    )
  ]
  sure, best = [None, *read.log_probs.tolist()], [None, *best]
  tokens, at, detokenizer = [], 0, Detokenizer(model.tokenizer)
  for token, log_prob, top in zip(ids, sure, best, strict=False):
    offset = min(at, len(wish.head))
    tokens.append(Token(id=token, log_prob=log_prob, offset=offset, best=top))
    at += len(detokenizer.add([token]))
  return tokens

"""What an engine is asked for, and what it says while it answers.

A request is one row: one prompt or template, one text. Several texts of a prompt
are several requests of other numbers. Events go to the request's listener, from
the engine's thread, in this order: any number of `Committed` and `Draft`, then
one `Finished`. Text is the business of whoever listens: these are tokens.
"""

from collections.abc import Callable
import dataclasses
from typing import Literal

from dllm_jax.sampling.options import RowOptions

Reason = Literal["stop", "length", "cancelled", "failed"]
"""Why a row is over: an end token; all of its slots are filled; its ticket was
cancelled; its network call gave no numbers, or the engine stopped."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """One row that is wanted.

  Attributes:
    template: token ids, None at each slot to be sampled: a prompt and then as
      many None as tokens are wanted at most, or given tokens anywhere.
    number: with `options.seed`, which is 0 if it is None, this decides the noise:
      a request has the tokens that `run.sample_rows([template], length=L,
      sampler=..., numbers=[number], options=[options])` gives it with the engine's
      sampler and canvas of L slots.
    options: what it chooses; the engine's sampler has the rest.
    drafts: whether the listener is told the canvas at each network call.
  """

  template: tuple[int | None, ...]
  number: int = 0
  options: RowOptions = RowOptions()
  drafts: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Committed:
  """Slots that are final now, next from the left.

  All of them, one after another, are the text of the row: what was sampled, and
  what the template gave after its first free slot. The end token is not among
  them, nor what was sampled after it.

  Attributes:
    slots: where in the template.
    tokens: what stands there.
    log_probs: of each token at the call that committed it, nats; None where the
      template gave it (`Generation.log_prob`).
    tops: of each the likeliest tokens then and their log-probabilities, best
      first, as many as the engine's `top`; empty where the template gave it.
  """

  slots: tuple[int, ...]
  tokens: tuple[int, ...]
  log_probs: tuple[float | None, ...]
  tops: tuple[tuple[tuple[int, float], ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
  """The canvas as it is after a network call.

  Attributes:
    call: network calls of the row so far, from 1.
    tokens: of each slot from the first free one; None where it is masked.
    log_probs: of each at the call that committed it, nats; None where it is
      masked or was given.
  """

  call: int
  tokens: tuple[int | None, ...]
  log_probs: tuple[float | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Usage:
  """What a row cost.

  Attributes:
    prompt: tokens that the template gave.
    completion: tokens that were committed, the end token left out.
    cached: of the prompt, those whose keys and values another row had.
    calls: network calls that the row took part in.
  """

  prompt: int
  completion: int
  cached: int = 0
  calls: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finished:
  """The row is over, its slot free; nothing follows.

  Attributes:
    reason: why.
    usage: what it cost.
  """

  reason: Reason
  usage: Usage


Event = Committed | Draft | Finished
Listener = Callable[[Event], None]
"""Called from the engine's thread: it must return at once, and not raise."""


class Full(Exception):  # noqa: N818  it is a state, not a mistake
  """The queue is at its limit: try again later."""


class Closed(Exception):  # noqa: N818
  """The engine is not serving: not started, stopping or stopped."""

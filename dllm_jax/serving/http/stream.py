"""What a client that streams is sent: server-sent events, as text is final.

`POST /v1/chat/completions` and `POST /v1/completions` with `"stream": true`:

    data: {"id": ..., "object": "chat.completion.chunk", "created": ...,
           "model": ..., "choices": [{"index": 0, "delta": {"content": "To be"},
           "finish_reason": null, "logprobs": null}]}

    data: [DONE]

A chunk comes as soon as the text from the left is final; the first one of a
chat's choice carries the role, the last one of a choice its `finish_reason`
("stop" or "length"). Completions have `"object": "text_completion"` and
`"choices": [{"index": 0, "text": "To be", ...}]`. What goes wrong afterwards is
a last chunk `data: {"error": {"message", "type", "param", "code"}}`.

With `"stream_drafts": true` besides, each network call adds the canvas as it
is, an event of its own:

    event: draft
    data: {"id": ..., "object": "dllm.draft", "choices": [], "index": 0,
           "call": 3, "slots": [{"text": "To", "p": 0.93},
           {"text": null, "p": null}, ...]}

- `index`: the choice; `call`: the network calls of this choice so far, from 1.
- `slots`: the row from the first slot that is to be filled, without the prompt
  before it; what was given after it (a suffix, an infill's text) is there too.
- `text`: of the token in the slot, by itself; null where the slot is still
  masked. It may be replaced in later drafts, where the policy revises.
- `p`: the probability of that token at the call that committed it, in [0, 1];
  null where the slot is masked or was given.

The last draft of a choice shows it whole, or up to what ended it. Drafts are
what a slow reader misses first: each one is whole, so the next makes up for it.
`choices` is empty so that clients that know nothing of drafts find none.

With `"stream_options": {"include_usage": true}` a chunk before the last has
`"choices": []` and `"usage": {"prompt_tokens", "completion_tokens",
"total_tokens", "prompt_tokens_details": {"cached_tokens"}, "network_calls"}`.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
import contextlib
import dataclasses
import json
import time
from typing import Any

from starlette import responses

from dllm_jax.evaluation.likelihood.reading import Reading
from dllm_jax.serving.http.answer import Answer, Piece, told
from dllm_jax.serving.http.forms import Form, usage
from dllm_jax.serving.http.limits import Refusal
from dllm_jax.serving.http.model import Model
from dllm_jax.serving.http.wishes import Wishes
from dllm_jax.serving.requests import Closed, Finished, Full, Usage

Receive = Callable[[], Awaitable[dict[str, Any]]]
FAILED = "the answer failed in the network: try again"
_LATE = "the answer took longer than {:g} seconds: ask for fewer tokens"


@dataclasses.dataclass(frozen=True)
class Deadline:
  """When an answer has to be whole.

  Attributes:
    since: when it began, by `time.monotonic`.
    seconds: that it may take from then on.
  """

  since: float
  seconds: float


class Gone(Exception):  # noqa: N818
  """The client has hung up."""


class Answers:
  """The choices of one response, while the engine fills them.

  Args:
    wishes: what is wanted.
    model: what writes.
    retry_after: seconds after which a full queue may have room.
    readings: of each prompt, where its tokens are told; else none.

  Attributes:
    answers: one for each choice.
  """

  def __init__(
    self,
    wishes: Wishes,
    model: Model,
    retry_after: Callable[[], int],
    readings: Sequence[Reading] = (),
  ):
    self.wishes, self._model = wishes, model
    self._retry_after = retry_after
    self._changed = asyncio.Event()
    self._gone = False
    self._read = sum(reading.calls for reading in readings)
    prompts = [
      told(wish, reading, model)
      for wish, reading in zip(
        wishes.answers[:: wishes.n], readings, strict=False
      )
    ]
    self.answers = [
      Answer(
        wish,
        wishes,
        model,
        self._changed.set,
        prompts[i // wishes.n] if prompts else (),
      )
      for i, wish in enumerate(wishes.answers)
    ]

  def submit(self) -> None:
    """Hands all requests to the engine, or none.

    Raises:
      Refusal: the queue is full, or the engine does not serve.
    """
    loop = asyncio.get_running_loop()
    try:
      for answer in self.answers:
        request = answer.wish.request
        if request is None:
          cost = Usage(prompt=len(answer.wish.before), completion=0)
          answer.hear(Finished(reason="length", usage=cost))
          continue
        hear = _elsewhere(loop, answer.hear)
        answer.holds(self._model.engine.submit(request, hear))
    except Full as error:
      self.cancel()
      raise Refusal(
        "the queue is full: try again later",
        status=429,
        code="queue_full",
        headers={"Retry-After": str(self._retry_after())},
      ) from error
    except Closed as error:
      self.cancel()
      raise closed() from error

  def cancel(self) -> None:
    """Frees what the engine still holds."""
    for answer in self.answers:
      answer.cancel()

  def leave(self) -> None:
    """Says that the client has hung up."""
    self._gone = True
    self._changed.set()

  async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
    """Yields what is new, with the number of its choice, until all is over.

    Raises:
      Gone: the client has hung up.
    """
    over = False
    while not over:
      await self._changed.wait()
      self._changed.clear()
      if self._gone:
        raise Gone
      over = all(answer.over for answer in self.answers)
      for index, answer in enumerate(self.answers):
        if (piece := answer.take()) is not None:
          yield index, piece

  @property
  def usage(self) -> dict[str, Any]:
    """What all choices cost, once they are over."""
    return usage(self.answers, self.wishes.n, read=self._read)


def closed() -> Refusal:
  """Returns the refusal of a server that does not serve, or no longer."""
  return Refusal(
    "the server is starting or stopping: try again, or elsewhere",
    status=503,
    code="unavailable",
    headers={"Retry-After": "2"},
  )


def _elsewhere(loop: asyncio.AbstractEventLoop, hear: Callable[[Any], None]):
  """Returns a listener that hears in the thread of a loop."""

  def tell(event):
    with contextlib.suppress(RuntimeError):  # the loop has ended
      loop.call_soon_threadsafe(hear, event)

  return tell


@contextlib.asynccontextmanager
async def attended(
  answers: Answers, receive: Receive, deadline: Deadline
) -> AsyncIterator[None]:
  """Ends what is inside when its client goes, or when its time is over.

  The engine's slots are free afterwards, whatever happened.

  Args:
    answers: what the engine fills.
    receive: of ASGI, after the body.
    deadline: when its time is over.

  Raises:
    Gone: the client has hung up, which `Answers.pieces` tells.
    Refusal: time is over.
  """

  async def watch():
    while (await receive())["type"] != "http.disconnect":
      pass
    answers.leave()

  watching = asyncio.create_task(watch())
  try:
    async with timely(deadline):
      yield
  finally:
    watching.cancel()
    answers.cancel()


@contextlib.asynccontextmanager
async def timely(deadline: Deadline) -> AsyncIterator[None]:
  """Refuses what takes longer.

  Raises:
    Refusal: time is over.
  """
  try:
    left = deadline.since + deadline.seconds - time.monotonic()
    async with asyncio.timeout(left):
      yield
  except TimeoutError:
    raise Refusal(
      _LATE.format(deadline.seconds),
      status=408,
      code="timeout",
      headers={"x-should-retry": "false"},
    ) from None


async def whole(answers: Answers, form: Form) -> dict[str, Any]:
  """Returns a response in one piece.

  Raises:
    Refusal: an answer failed.
  """
  found: list[list[Piece]] = [[] for _ in answers.answers]
  async for index, piece in answers.pieces():
    found[index].append(piece)
  made = [joined(pieces) for pieces in found]
  if any(piece.finish == "failed" for piece in made):
    raise Refusal(FAILED, status=500, code="failed")
  return form.whole(made, answers.usage)


def joined(pieces: Sequence[Piece]) -> Piece:
  """Returns an answer's pieces as one."""
  return Piece(
    text="".join(piece.text for piece in pieces),
    tokens=[token for piece in pieces for token in piece.tokens],
    finish=pieces[-1].finish,
  )


class EventStream(responses.Response):
  """A response of server-sent events.

  Args:
    answers: what the engine fills.
    form: what chunks look like.
    deadline: when its time is over, its reader's included.
    ended: called at its end with how it ended: a status.
  """

  def __init__(
    self,
    answers: Answers,
    form: Form,
    deadline: Deadline,
    ended: Callable[[int], None],
  ):
    super().__init__(
      media_type="text/event-stream",
      headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )
    del self.headers["content-length"]
    self._answers, self._form = answers, form
    self._deadline, self._ended = deadline, ended
    self._first = set(range(len(answers.answers)))

  async def __call__(self, scope, receive, send) -> None:
    """Sends the events; a reader that is slow is waited for."""
    body = lambda data, more=True: send({
      "type": "http.response.body",
      "body": data,
      "more_body": more,
    })
    status = 499  # the client has gone
    try:
      async with attended(self._answers, receive, self._deadline):
        start = {"type": "http.response.start", "status": 200}
        await send(start | {"headers": self.raw_headers})
        async for index, piece in self._answers.pieces():
          await body(self._piece(index, piece))
        await body(self._last(), False)
        status = 200
    except Gone:
      pass
    except Refusal as refusal:
      status = refusal.status
      with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(1):  # its reader may not read
          await body(_event(refusal.body()), False)
    except OSError:  # it went while it was sent to
      pass
    finally:
      self._ended(status)

  def _piece(self, index: int, piece: Piece) -> bytes:
    """Returns the events of a piece."""
    data = b""
    if piece.draft is not None:
      draft = self._form.draft(index, piece.draft)
      data = b"event: draft\n" + _event(draft)
    if piece.finish == "failed":
      refusal = Refusal(FAILED, status=500, code="failed")
      return data + _event(refusal.body())
    if piece.text or piece.finish:
      first = index in self._first
      self._first.discard(index)
      choice = self._form.part(index, piece, first=first)
      data += self._chunk([choice])
    return data

  def _last(self) -> bytes:
    done = b"data: [DONE]\n\n"
    if not self._answers.wishes.usage:
      return done
    return self._chunk([], usage=self._answers.usage) + done

  def _chunk(self, choices: Sequence[Any], **fields: Any) -> bytes:
    if self._answers.wishes.usage:
      fields = {"usage": None} | fields
    return _event(self._form.chunk(choices, **fields))


def _event(data: Any) -> bytes:
  return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"

"""What every request passes first: keys, sizes, times, and whether there is room.

An ASGI application around another. Bodies are read here, whole, so that nothing
behind waits for a client that sends slowly.
"""

import asyncio
from collections.abc import Callable
import contextlib
import hashlib
import hmac
import json
from typing import Any

from dllm_jax.serving.http.limits import Limits, Refusal
from dllm_jax.serving.http.stream import closed

# Times the legal size that is read of a body that is too long: clients that are
# hung up on while they send do not read why.
_DISCARDED = 8
OPEN = ("/", "/health")
"""Paths that want no key: what is there tells nothing."""


class Gate:
  """Lets requests in that have a key, a size and a time that are legal.

  Args:
    app: what is behind it.
    limits: what is legal.
    key: what a client has to know; None for nothing.
    ready: whether there is anything behind it that answers.
    refused: told the path and the status of what is not let in.

  Attributes:
    draining: whether nobody is let in any more.
    active: requests that are being answered.
  """

  def __init__(
    self,
    app: Any,
    limits: Limits,
    *,
    key: str | None,
    ready: Callable[[], bool],
    refused: Callable[[str, int], None],
  ):
    self._app, self._limits = app, limits
    self._ready, self._refused = ready, refused
    self._key = None if key is None else _digest(key.encode())
    self._idle = asyncio.Event()
    self._idle.set()
    self.draining = False
    self.active = 0

  async def __call__(self, scope, receive, send) -> None:
    """Answers a request, or has it answered."""
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    try:
      self._known(scope)
      if scope["method"] != "POST":
        await self._app(scope, receive, send)
        return
      with self._inside():
        body = await self._read(scope, receive)
        await self._app(scope, _replayed(body, receive), send)
    except Refusal as refusal:
      self._refused(scope["path"], refusal.status)
      await _refuse(refusal, send)
    except ConnectionError:
      pass

  async def idle(self) -> None:
    """Returns when no request is being answered."""
    await self._idle.wait()

  def _known(self, scope) -> None:
    """Raises Refusal unless the client knows the key."""
    if self._key is None or scope["path"] in OPEN:
      return
    given = dict(scope["headers"]).get(b"authorization", b"")
    scheme, _, value = given.partition(b" ")
    # Digests have one length, and are compared in one time.
    right = hmac.compare_digest(_digest(value.strip()), self._key)
    if scheme.lower() != b"bearer" or not right:
      raise Refusal(
        "give the server's key as `Authorization: Bearer KEY`",
        status=401,
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
      )

  @contextlib.contextmanager
  def _inside(self):
    """Counts a request while it is answered.

    Raises:
      Refusal: there are too many, or none is taken.
    """
    if self.draining or not self._ready():
      raise closed()
    if self.active >= self._limits.concurrent:
      raise Refusal(
        f"{self.active} requests are being answered, which is the most: try "
        "again later",
        status=429,
        code="too_many_requests",
        headers={"Retry-After": "1"},
      )
    self.active += 1
    self._idle.clear()
    try:
      yield
    finally:
      self.active -= 1
      if not self.active:
        self._idle.set()

  async def _read(self, scope, receive) -> bytes:
    """Returns a body.

    Raises:
      Refusal: it is too long, or slow.
      ConnectionError: the client went.
    """
    most, seconds = self._limits.body_bytes, self._limits.body_seconds
    stated = dict(scope["headers"]).get(b"content-length", b"0")
    stated = int(stated) if stated.isdigit() else 0
    parts, size, more = [], 0, stated <= _DISCARDED * most
    try:
      async with asyncio.timeout(seconds):
        while more:
          message = await receive()
          if message["type"] == "http.disconnect":
            raise ConnectionError
          part = message.get("body", b"")
          size += len(part)
          more = message.get("more_body", False) and size <= _DISCARDED * most
          parts = parts if size <= most else []
          parts.append(part)
    except TimeoutError:
      raise Refusal(
        f"the body did not arrive in {seconds:g} seconds",
        status=408,
        code="timeout",
        headers={"Connection": "close"},
      ) from None
    if max(size, stated) > most:
      raise Refusal(
        f"the body has {max(size, stated):,} bytes, more than {most:,}",
        status=413,
        code="body_too_large",
        headers={"Connection": "close"},
      )
    return b"".join(parts)


def _digest(value: bytes) -> bytes:
  return hashlib.sha256(value).digest()


def _replayed(body: bytes, receive):
  """Returns a `receive` that gives a body, and then what comes after it."""
  given = False

  async def again():
    nonlocal given
    if given:
      return await receive()
    given = True
    return {"type": "http.request", "body": body, "more_body": False}

  return again


async def _refuse(refusal: Refusal, send) -> None:
  data = json.dumps(refusal.body()).encode()
  headers = {
    "content-type": "application/json",
    "content-length": str(len(data)),
  } | dict(refusal.headers)
  pairs = [(k.lower().encode(), v.encode()) for k, v in headers.items()]
  start = {"type": "http.response.start", "status": refusal.status}
  await send(start | {"headers": pairs})
  await send({"type": "http.response.body", "body": data})

"""Running an application: listening, and ending without dropping answers."""

import asyncio
from collections.abc import Mapping
import dataclasses
import socket
import threading
import time
from typing import Any

import jax
import uvicorn

from dllm_jax.parallel import distributed
from dllm_jax.serving.http.gate import Gate
from dllm_jax.serving.http.limits import Limits
from dllm_jax.serving.http.model import Model
from dllm_jax.serving.http.routes import application


class Server(uvicorn.Server):
  """A server that SIGTERM or Ctrl-C drains, and a second one ends.

  While it drains it still listens, and answers 503, so that a load balancer
  sends its clients elsewhere; answers under way go on, until they are over or
  the deadline comes.

  Args:
    gate: the application.
    host: the address to listen at.
    port: 0 for any that is free.
    limits: of requests.
  """

  def __init__(self, gate: Gate, *, host: str, port: int, limits: Limits):
    super().__init__(
      uvicorn.Config(
        gate,
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,  # beyond the time to drain
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 * 1024,
      )
    )
    self._gate, self._limits = gate, limits
    self._loop: asyncio.AbstractEventLoop | None = None
    self._draining: asyncio.Task | None = None
    self.listening = threading.Event()

  async def startup(self, sockets=None) -> None:
    """Begins to listen."""
    self._loop = asyncio.get_running_loop()
    await super().startup(sockets)
    self.listening.set()

  @property
  def address(self) -> tuple[str, int]:
    """Where it listens."""
    return self.servers[0].sockets[0].getsockname()[:2]

  def handle_exit(self, sig, frame) -> None:
    """Drains, at the first signal; ends, at the second."""
    if self._gate.draining or self._loop is None:
      super().handle_exit(sig, frame)
    else:
      self._gate.draining = True
      self._loop.call_soon_threadsafe(self.drain)

  def drain(self) -> None:
    """Takes no more requests, and ends when those that it has are over."""
    seconds = self._limits.drain_seconds
    print(
      f"stopping: what is under way has {seconds:g} s; again to end at once",
      flush=True,
    )
    self._gate.draining = True
    self._draining = asyncio.ensure_future(self._drain())

  async def _drain(self) -> None:
    try:
      async with asyncio.timeout(self._limits.drain_seconds):
        await self._gate.idle()
    except TimeoutError:
      pass
    self.should_exit = True


class _Stopped(Exception):
  """A signal came before all was compiled."""


def serve(
  model: Model, *, host: str, port: int, key: str | None = None
) -> Mapping[str, Any]:
  """Serves a model until a signal ends it; returns what was served.

  Of several processes the first takes requests, and all run the program.

  Args:
    model: what is served; its engine is started, and stopped.
    host: the address to listen at.
    port: 0 for any that is free.
    key: what clients have to know; None for nothing.
  """
  if distributed.index():
    model.engine.start()
    model.engine.join()
    return _served(model)
  listener = _listening(host, port)
  gate = application(model, key=key)
  server = Server(gate, host=host, port=port, limits=model.limits)
  failed: list[BaseException] = []

  def start() -> None:
    began = time.monotonic()
    server.listening.wait()
    where = "http://{}:{}".format(*server.address)
    print(f"{model.name} at {where}, compiling", flush=True)

    def before(number: int, count: int) -> None:
      # Of several processes the others would wait for this one.
      if gate.draining and jax.process_count() == 1:
        raise _Stopped
      print(f"program {number} of {count}", flush=True)

    try:
      model.engine.start(before)
    except _Stopped:
      return
    except BaseException as error:  # noqa: BLE001  Told by the main thread.
      failed.append(error)
      server.should_exit = True
      return
    print(f"ready after {time.monotonic() - began:.1f} s", flush=True)

  starting = threading.Thread(target=start, name="start", daemon=True)
  starting.start()
  server.run(sockets=[listener])
  starting.join()  # The interpreter's end under a compiler is an abort.
  if failed:
    raise failed[0]
  model.engine.stop()
  return _served(model)


def _listening(host: str, port: int) -> socket.socket:
  """Returns a socket that listens at an address.

  Raises:
    ValueError: it is no address of this machine, or taken.
  """
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  try:
    return socket.create_server((host, port), family=family, backlog=2048)
  except (OSError, OverflowError) as error:
    reason = getattr(error, "strerror", None) or error
    raise ValueError(
      f"cannot listen at {host}, port {port} ({reason}): choose another --host "
      "or --port"
    ) from error


def _served(model: Model) -> dict[str, Any]:
  stats = dataclasses.asdict(model.engine.stats)
  return {name: stats[name] for name in ("finished", "tokens", "calls")}

"""Clients that misbehave: the server goes on, and no other request notices."""

import contextlib
import dataclasses
import http.client
import json
import os
import signal
import threading
import time
import types

import pytest

from dllm_jax.serving.http import server as http_server
from dllm_jax.serving.http.limits import Limits
from tests.quick import long
from tests.serving.crowd import bodies, Crowd
from tests.serving.servers import events, Front, send


def settled(server, seconds: float = 20.0) -> None:
  """Waits until nothing is answered any more; fails if that does not come."""
  until = time.monotonic() + seconds
  while time.monotonic() < until:
    stats = server.engine.stats
    if not (stats.running or stats.waiting or server.gate.active):
      return
    time.sleep(0.01)
  raise AssertionError(f"{stats}, {server.gate.active} requests")


@contextlib.contextmanager
def held(server):
  """Lets the engine answer nobody inside: its scheduler waits."""
  engine, go = server.engine, threading.Event()
  follow = engine._scheduler.follow

  def waits(plan):
    go.wait(30)
    return follow(plan)

  engine._scheduler.follow = waits
  try:
    yield
  finally:
    go.set()
    engine._scheduler.follow = follow


@pytest.fixture(scope="module")
def answers(server):
  return [
    (b, server.text(b["prompt"], b["max_tokens"], seed=b["seed"]))
    for b in bodies(1)
  ]


@pytest.mark.parametrize("seed", [0, *map(long, range(1, 5))])
@pytest.mark.all
def test_faults_are_noticed_by_no_other(server, answers, seed):
  crowd = Crowd(server.url, answers)
  until = time.monotonic() + 60
  crowd.all(clients=7, requests=5, seed=seed, until=until)
  assert not crowd.wrong
  assert crowd.served >= 5
  assert max(crowd.statuses) < 500
  settled(server)


def test_a_client_that_goes_frees_its_slots(server):
  before = server.engine.stats.finished.get("cancelled", 0)
  crowd = Crowd(server.url, [])
  for stream in (True, False):
    crowd.hangs_up(reads=int(stream), slowly=False, stream=stream, n=4)
  settled(server)
  assert server.engine.stats.finished["cancelled"] > before


def test_an_answer_has_its_time(server, limits):
  model = dataclasses.replace(server.model, limits=limits(seconds=0.05))
  front = Front(model)
  url = f"{front.url}/v1/completions"
  body = bodies()[0] | {"max_tokens": 40}
  with held(server):
    status, headers, made = send(url, body)
    told = events(url, body | {"stream": True})
  front.stop()
  assert status == 408 and headers["x-should-retry"] == "false"
  ((_, data),) = told
  assert made == json.loads(data) and "0.05 seconds" in made["error"]["message"]
  settled(server)


def test_a_full_queue_is_told_when_to_come_again(server):
  url, room = f"{server.url}/v1/completions", server.engine.queue
  ask = lambda: send(url, bodies()[0] | {"max_tokens": 40})
  with held(server):
    server.engine.queue = -server.engine.slots
    status, headers, made = ask()
    server.engine.queue = room
  assert status == 429 and int(headers["retry-after"]) >= 1
  assert made["error"]["type"] == "rate_limit_error"
  assert ask()[0] == 200
  settled(server)


def test_no_more_at_once_than_is_allowed(server, limits):
  front = Front(dataclasses.replace(server.model, limits=limits(concurrent=1)))
  url = f"{front.url}/v1/completions"
  with held(server):
    asking = threading.Thread(target=send, args=(url, bodies()[0]))
    asking.start()
    while not front.gate.active:
      time.sleep(0.001)
    status, headers, made = send(url, bodies()[0])
  asking.join()
  front.stop()
  assert status == 429 and headers["retry-after"]
  assert made["error"]["code"] == "too_many_requests"


def test_a_server_drains(server, limits):
  front = Front(
    dataclasses.replace(server.model, limits=limits(drain_seconds=20.0))
  )
  url, found = f"{front.url}/v1/completions", []
  ask = lambda: found.append(send(url, bodies()[0] | {"max_tokens": 40}))
  with held(server):
    asking = threading.Thread(target=ask)
    asking.start()
    while not front.gate.active:
      time.sleep(0.001)
    front.server.handle_exit(signal.SIGTERM, None)
    late, health = send(url, bodies()[0]), send(f"{front.url}/health")
  asking.join()
  front.ended()
  status, _, made = found[0]
  assert status == 200 and made["usage"]["completion_tokens"]
  assert late[0] == health[0] == 503
  assert late[2]["error"]["code"] == "unavailable"
  assert int(late[1]["retry-after"]) >= 1


@pytest.mark.all
def test_a_drain_has_a_deadline(server, limits):
  front = Front(
    dataclasses.replace(server.model, limits=limits(drain_seconds=0.1))
  )
  told = []

  def ask():
    with contextlib.suppress(OSError):
      told.append(send(f"{front.url}/v1/completions", bodies()[0]))

  with held(server):
    asking = threading.Thread(target=ask)
    asking.start()
    while not front.gate.active:
      time.sleep(0.001)
    began = time.monotonic()
    front.server.handle_exit(signal.SIGTERM, None)
    front.ended()
    assert time.monotonic() - began < 8
  asking.join()
  settled(server)


class _Gate:
  """An application that answers nobody."""

  draining = False

  async def __call__(self, scope, receive, send):
    raise RuntimeError(scope["type"])  # no lifespan

  async def idle(self):
    """Is so at once."""


@pytest.mark.all
def test_a_signal_while_it_compiles_ends_it_before_the_next_program(
  monkeypatch,
):
  done, said = [], []
  say = lambda text, flush: said.append(text)
  monkeypatch.setattr(http_server, "print", say, raising=False)

  @dataclasses.dataclass
  class Stats:
    finished: int = 0
    tokens: int = 0
    calls: int = 0

  class Engine:
    stats = Stats()

    def start(self, before):
      before(1, 2)
      os.kill(os.getpid(), signal.SIGTERM)
      time.sleep(1.0)  # drained long before
      done.append("compiled")
      before(2, 2)
      done.append("never")

    def stop(self):
      done.append("stopped")

  monkeypatch.setattr(http_server, "application", lambda *_, **__: _Gate())
  model = types.SimpleNamespace(engine=Engine(), name="m", limits=Limits())
  assert http_server.serve(model, host="127.0.0.1", port=0)["tokens"] == 0
  assert done == ["compiled", "stopped"]
  begun, first, stopping = said  # and is never ready
  assert begun.endswith("compiling") and first == "program 1 of 2"
  assert stopping.startswith("stopping")


def test_a_prompt_that_nobody_waits_for_is_not_read_on(server):
  readings, calls = server.model.readings, []

  def reader(prompt, *, gone):
    while not gone():
      calls.append(prompt)
      time.sleep(0.01)
    raise RuntimeError("nobody hears this")

  body = bodies(1)[0] | {"echo": True, "logprobs": 0}
  text, headers = json.dumps(body), {"Content-Type": "application/json"}
  address = server.url.removeprefix("http://")
  before = readings.__dict__.get("_reader")
  readings.__dict__["_reader"] = reader
  try:
    with contextlib.closing(http.client.HTTPConnection(address)) as client:
      client.request("POST", "/v1/completions", text, headers)
      until = time.monotonic() + 20
      while not calls and time.monotonic() < until:
        time.sleep(0.01)
      # Others are answered meanwhile.
      assert send(f"{server.url}/v1/completions", bodies(1)[0])[0] == 200
    settled(server)
    count = len(calls)
    time.sleep(0.1)
    assert 0 < count == len(calls) and readings._waiting == 0
  finally:
    readings.__dict__.pop("_reader")
    if before is not None:
      readings.__dict__["_reader"] = before
  assert send(f"{server.url}/v1/completions", body)[0] == 200

"""Clients that misbehave: the server goes on, and no other request notices."""

import signal
import threading
import time

import pytest

from tests import runs
from tests.serving.crowd import bodies, Crowd
from tests.serving.servers import NAME, Running, send


def settled(server, seconds: float = 20.0) -> None:
  """Waits until nothing is answered any more; fails if that does not come."""
  until = time.monotonic() + seconds
  while time.monotonic() < until:
    stats = server.engine.stats
    if not (stats.running or stats.waiting or server.gate.active):
      return
    time.sleep(0.01)
  raise AssertionError(f"{stats}, {server.gate.active} requests")


@pytest.fixture(scope="module")
def answers(server):
  return [
    (b, server.text(b["prompt"], b["max_tokens"], seed=b["seed"]))
    for b in bodies(1)
  ]


@pytest.mark.parametrize("seed", range(5))
def test_faults_are_noticed_by_no_other(server, answers, seed):
  crowd = Crowd(server.url, answers)
  until = time.monotonic() + 60
  crowd.all(clients=8, requests=6, seed=seed, until=until)
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


def test_a_reader_that_stops_is_hung_up_on(tiny_run, server, limits):
  """Its answer waits no longer than is allowed, and takes no slot meanwhile."""
  model, gate = server.model, server.gate
  # One connection that is never read, and more than its buffers hold.
  import dataclasses

  from dllm_jax import serving

  quick = dataclasses.replace(model, limits=limits(seconds=0.0))
  made = serving.application(quick)
  status = []

  async def send_(message):
    status.append(message.get("status"))

  async def run():
    import asyncio
    import json

    body = json.dumps(bodies()[0]).encode()
    told = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
      if told:
        return told.pop()
      await asyncio.sleep(60)

    scope = {
      "type": "http",
      "method": "POST",
      "path": "/v1/completions",
      "raw_path": b"/v1/completions",
      "query_string": b"",
      "headers": [(b"content-type", b"application/json")],
      "client": ("127.0.0.1", 1),
      "server": ("127.0.0.1", 1),
      "scheme": "http",
      "http_version": "1.1",
    }
    await made(scope, receive, send_)

  import asyncio

  asyncio.run(run())
  assert status[0] == 408
  settled(server)


def test_a_full_queue_is_told_when_to_come_again(server):
  held = server.engine.queue
  server.engine.queue = 0
  try:
    found = []
    ask = lambda: found.append(
      send(f"{server.url}/v1/completions", bodies()[0] | {"n": 4})
    )
    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  finally:
    server.engine.queue = held
  statuses = [status for status, _, _ in found]
  assert set(statuses) == {200, 429}
  for status, headers, made in found:
    if status == 429:
      assert int(headers["retry-after"]) >= 1
      assert made["error"]["type"] == "rate_limit_error"
  settled(server)


def test_a_server_drains(tiny_run, limits):
  running = Running(
    tiny_run, limits=limits(drain_seconds=20.0), slots=1
  ).start()
  found = []
  ask = lambda: found.append(
    send(f"{running.url}/v1/completions", bodies()[0] | {"max_tokens": 40})
  )
  asking = threading.Thread(target=ask)
  asking.start()
  while not running.gate.active:
    time.sleep(0.001)
  running.server.handle_exit(signal.SIGTERM, None)
  while running.gate.active and not running.gate.draining:
    time.sleep(0.001)
  late = send(f"{running.url}/v1/completions", bodies()[0])
  health = send(f"{running.url}/health")
  asking.join()
  running.stop()
  (status, _, made) = found[0]
  assert status == 200 and made["usage"]["completion_tokens"]
  assert late[0] == health[0] == 503
  assert late[2]["error"]["code"] == "unavailable"
  assert int(late[1]["retry-after"]) >= 1

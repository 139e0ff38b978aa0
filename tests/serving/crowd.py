"""Clients that behave, and those that do not; each knows what it should be told.

A `Crowd` sends bounded numbers of requests to one server on loopback, from
threads, and keeps what was not as it should be.
"""

import json
import random
import socket
import threading
import time
import urllib.parse

from tests.serving.servers import NAME, send

PROMPTS = ("ROMEO:", "To be, or", "a", "naïve 日本")
ROUTE = "/v1/completions"


def bodies(seeds: int = 2, new: int = 12) -> list[dict]:
  """Returns bodies of requests whose answers are known offline."""
  return [
    {"model": NAME, "prompt": prompt, "max_tokens": new, "seed": seed}
    for prompt in PROMPTS
    for seed in range(seeds)
  ]


class Crowd:
  """Clients of one server.

  Args:
    url: of the server.
    answers: bodies of requests with the text that each is to be given.
    key: that the server wants, or None.

  Attributes:
    wrong: what was not as it should be, in words.
    served: answers that were as they should be.
    statuses: how often each status was told.
  """

  def __init__(self, url: str, answers: list[tuple[dict, str]], key=None):
    self._url, self._answers = url, answers
    parts = urllib.parse.urlsplit(url)
    self._address = parts.hostname, parts.port
    self._headers = {"Authorization": f"Bearer {key}"} if key else {}
    self._lock = threading.Lock()
    self.wrong: list[str] = []
    self.served = 0
    self.statuses: dict[int, int] = {}

  def client(self, seed: int, requests: int, until: float) -> None:
    """Sends so many requests one after another, none of them after `until`."""
    draw = random.Random(seed)
    for _ in range(requests):
      if time.monotonic() > until:
        return
      act = draw.choice((self.asks, self.streams, *FAULTS))
      try:
        act(self, draw) if act in FAULTS else act(draw)
      except Exception as error:  # noqa: BLE001  told with all others
        self._tell(f"{act.__name__}: {error!r}")

  def all(self, clients: int, requests: int, *, seed: int, until: float):
    """Runs clients at once, and waits for them."""
    threads = [
      threading.Thread(
        target=self.client, args=(1000 * seed + i, requests, until), daemon=True
      )
      for i in range(clients)
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()

  def _tell(self, text: str) -> None:
    with self._lock:
      self.wrong.append(text)

  def _send(self, body=None, *, route=ROUTE, **given):
    answer = send(
      f"{self._url}{route}", body, headers=dict(self._headers), **given
    )
    with self._lock:
      self.statuses[answer[0]] = self.statuses.get(answer[0], 0) + 1
    return answer

  def asks(self, draw: random.Random) -> None:
    """Asks, and compares the answer with that of the offline sampler."""
    body, text = draw.choice(self._answers)
    status, headers, made = self._send(body)
    if status == 429 and headers["retry-after"]:
      time.sleep(0.2)
    elif status != 200 or made["choices"][0]["text"] != text:
      self._tell(f"{body} gave {status} {made}, not {text!r}")
    else:
      self.served += 1

  def streams(self, draw: random.Random) -> None:
    """The same in a stream."""
    body, text = draw.choice(self._answers)
    drafts = draw.random() < 0.5
    body = body | {"stream": True, "stream_drafts": drafts}
    status, headers, made = self._send(body)
    if status == 429 and headers["retry-after"]:
      time.sleep(0.2)
      return
    found = [
      json.loads(line.removeprefix("data: "))
      for line in (made.splitlines() if status == 200 else ())
      if line.startswith("data: {")
    ]
    told = "".join(c["text"] for event in found for c in event["choices"])
    if status != 200 or told != text or "[DONE]" not in made:
      self._tell(f"{body} gave {status} {made}, not {text!r}")
    else:
      self.served += 1

  def refused(self, says: str, body=None, **given) -> None:
    """Asks for what is to be refused."""
    status, _, made = self._send(body, **given)
    # A server that is full says so first.
    if status != 429 and (
      status != 400 or says not in made["error"]["message"]
    ):
      self._tell(f"{body or given} gave {status} {made}, not {says!r}")

  def hangs_up(self, *, reads: int, slowly: bool, **fields) -> None:
    """Asks, reads so many bytes, and hangs up."""
    body = bodies()[0] | {"max_tokens": 30} | fields
    data = json.dumps(body).encode()
    given = {
      "Host": "x",
      "Connection": "close",
      "Content-Type": "application/json",
      "Content-Length": str(len(data)),
    } | self._headers
    lines = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    with socket.create_connection(self._address, timeout=60) as client:
      if slowly:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
      client.sendall(f"POST {ROUTE} HTTP/1.1\r\n{lines}\r\n".encode() + data)
      for _ in range(reads):
        if not client.recv(16 if slowly else 1024):
          return
        time.sleep(0.02 if slowly else 0.0)


def malformed(crowd: Crowd, draw: random.Random) -> None:
  """Sends what is no JSON."""
  data = draw.choice((b"{", b"", b"[" * 999, b'{"a": \xff}', b"null"))
  crowd.refused("JSON", data=data)


def gone(crowd: Crowd, draw: random.Random) -> None:
  """Hangs up before the answer, or in the middle of it."""
  crowd.hangs_up(
    reads=draw.randrange(3), slowly=False, stream=draw.random() < 0.7
  )


def slow(crowd: Crowd, draw: random.Random) -> None:
  """Reads a stream slowly, drafts and all, and then no more."""
  crowd.hangs_up(
    reads=draw.randrange(20), slowly=True, stream=True, stream_drafts=True
  )


def illegal(crowd: Crowd, draw: random.Random) -> None:
  """Asks for what nobody is given."""
  body = bodies()[0]
  change, says = draw.choice((
    ({"stop": ""}, "stop"),
    ({"prompt": "a" * 90}, "more than the"),
    ({"n": 100, "max_tokens": 40}, "at most"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"seed": "3"}, "seed"),
  ))
  crowd.refused(says, body | change)


def masked(crowd: Crowd, draw: random.Random) -> None:
  """Has the mask's name in its prompt, as text."""
  status, _, made = crowd._send(
    bodies()[0] | {"prompt": "x [MASK] y", "echo": True, "max_tokens": 4}
  )
  fine = status == 200 and made["choices"][0]["text"].startswith("x [MASK] y")
  if not fine and status != 429:
    crowd._tell(f"a mask in a prompt gave {status} {made}")


FAULTS = (malformed, gone, slow, illegal, masked)

"""Who notices that a process died or hangs, and what the others are told."""

import contextlib
import threading
import time

from jax._src.lib import _jax
import pytest

from dllm_jax.parallel import distributed
from dllm_jax.parallel.watch import Watch
from tests.runs import free_port


@pytest.fixture(scope="module")
def stores():
  """The clients of three processes of jax's own coordination service."""
  address = f"localhost:{free_port()}"
  service = _jax.get_distributed_runtime_service(address, 3)
  clients = [
    _jax.get_distributed_runtime_client(address, i, init_timeout=20)
    for i in range(3)
  ]
  each = lambda do: [t.join() for t in [_thread(do, c) for c in clients]]
  each(lambda client: client.connect())
  yield clients
  each(lambda client: client.shutdown())
  service.shutdown()


def _thread(function, *args):
  thread = threading.Thread(target=function, args=args)
  thread.start()
  return thread


class Job:
  """Watches of several processes, and what each ended with."""

  def __init__(self, stores, monkeypatch, **limits):
    limits = {"hang_seconds": 60, "heartbeat_seconds": 1.2} | limits
    self.ended = {}
    self.watches = []
    for i, store in enumerate(stores):
      for key in ("dllm/watch/places/", "dllm/watch/verdict/"):
        if store is not None:
          store.key_value_delete(key)
      monkeypatch.setattr(distributed, "store", lambda store=store: store)
      monkeypatch.setattr(distributed, "index", lambda i=i: i)
      end = lambda message, i=i: self.ended.setdefault(i, message)
      self.watches.append(Watch(**limits, end=end))

  def wait(self, seconds=20):
    """Waits until some process ended, and what it said was heard."""
    limit = time.monotonic() + seconds
    while len(self.ended) < len(self.watches) and time.monotonic() < limit:
      time.sleep(0.02)
    return self.ended


def test_alone_it_notices_no_progress(monkeypatch, capfd):
  job = Job([None], monkeypatch, hang_seconds=0.3)
  with job.watches[0] as watch:
    for _ in range(10):
      watch.at(7, "reading data")
      time.sleep(0.05)
    assert not job.ended
    job.wait()
  assert "0.3 s (training.hang_seconds) after step 7 while" in job.ended[0]
  assert "reading data; start all" in job.ended[0]
  assert "test_watch.py" in capfd.readouterr().err  # where it hangs


@pytest.mark.all
def test_a_silent_process_is_named_to_all(stores, monkeypatch):
  job = Job(stores, monkeypatch)
  with contextlib.ExitStack() as stack:
    for watch in job.watches:
      stack.enter_context(watch)
    job.watches[1].at(5, "training")
    time.sleep(0.5)
    job.watches[1]._stopped.set()  # as SIGSTOP does to the whole process
    limit = time.monotonic() + 20
    while len(job.ended) < 2 and time.monotonic() < limit:
      time.sleep(0.02)
  assert sorted(job.ended) == [0, 2]
  for message in job.ended.values():
    assert message.startswith("process 1 (")
    assert "training after step 5 and has not been heard of" in message


def test_who_is_behind_is_named(stores, monkeypatch, capfd):
  job = Job(stores, monkeypatch, hang_seconds=1.0)
  with contextlib.ExitStack() as stack:
    for watch in job.watches:
      stack.enter_context(watch)
      watch.at(8, "training")
    job.watches[2].at(7, "reading data")
    job.wait()
  assert "process 2 (" in job.ended[0]
  assert "was reading data after step 7; 2 others after step 8" in job.ended[0]
  assert len(set(job.ended.values())) == 1 and len(job.ended) == 3


def test_a_failure_ends_the_others_at_once(stores, monkeypatch):
  job = Job(stores, monkeypatch)
  with job.watches[0], job.watches[2]:
    with pytest.raises(OSError), job.watches[1]:
      raise OSError("the file is gone")
    limit = time.monotonic() + 20
    while len(job.ended) < 2 and time.monotonic() < limit:
      time.sleep(0.02)
  assert "failed (OSError: the file is gone)" in job.ended[0]
  assert job.ended[2] == job.ended[0]


def test_a_coordinator_that_does_not_answer(monkeypatch):
  class Dead:
    def __getattr__(self, name):
      raise RuntimeError("unavailable")

  job = Job([None], monkeypatch)
  monkeypatch.setattr(distributed, "store", lambda: Dead())
  monkeypatch.setattr(distributed, "index", lambda: 1)
  end = lambda message: job.ended.setdefault(0, message)
  with Watch(hang_seconds=60, heartbeat_seconds=0.3, end=end):
    job.wait()
  assert "process 0, which coordinates, has not answered" in job.ended[0]


@pytest.mark.all
def test_who_is_done_is_not_missed(stores, monkeypatch):
  job = Job(stores, monkeypatch, heartbeat_seconds=2.0)
  with job.watches[0]:
    with job.watches[1]:
      time.sleep(0.5)
    time.sleep(3.0)
  assert not job.ended

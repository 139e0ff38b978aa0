"""Object stores on loopback: emulators of Cloud Storage and S3.

A test that asks for the fixture `buckets` gets `{"gs": "gs://...", "s3": ...}`,
new and empty; processes that it starts find the emulators by their environment.
"""

import contextlib
import functools
import http.server
import threading
import urllib.request

import pytest

SCHEMES = ("gs", "s3")


class _Threads(http.server.ThreadingHTTPServer):
  """One by one, connections that clients keep in store would stop all others."""

  request_queue_size = 128
  daemon_threads = True

  def handle_error(self, request, client_address) -> None:
    """Clients that are killed, or have seen enough, hang up: no news."""


def _one_at_a_time(handle):
  """Returns an answer that waits for others: the emulator's files are not locked."""
  lock = threading.Lock()

  @functools.wraps(handle)
  def alone(*args):
    with lock:
      return handle(*args)

  return alone


class Stores:
  """The two emulators; `bucket(scheme)` makes a new bucket."""

  def __init__(self, patch: pytest.MonkeyPatch):
    # Slow to import, and most tests do without.
    from gcp_storage_emulator import server
    from moto.server import ThreadedMotoServer

    from tests import runs

    patch.setattr(server.Router, "handle", _one_at_a_time(server.Router.handle))
    gcs, moto = runs.free_port(), runs.free_port()
    self.gcs, self._count = f"http://localhost:{gcs}", 0
    self._s3 = ThreadedMotoServer("localhost", moto, verbose=False)
    self._s3.start()
    with pytest.MonkeyPatch.context() as threads:
      threads.setattr(server.server, "HTTPServer", _Threads)
      self._gcs = server.create_server("localhost", gcs, in_memory=True)
      self._gcs.start()
    s3 = f"http://localhost:{moto}"
    for name, value in {
      # Arrays go by the first, everything else by the second.
      "TENSORSTORE_GCS_HTTP_URL": self.gcs,
      "STORAGE_EMULATOR_HOST": self.gcs,
      # The emulator knows no kinds of buckets, of which gcsfs asks.
      "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
      "AWS_ENDPOINT_URL": s3,
      "AWS_ACCESS_KEY_ID": "test",
      "AWS_SECRET_ACCESS_KEY": "test",
      "AWS_DEFAULT_REGION": "us-east-1",
      "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
      patch.setenv(name, value)

  def bucket(self, scheme: str) -> str:
    """Returns the address of a new bucket."""
    self._count += 1
    name = f"bucket-{self._count}"
    if scheme == "s3":
      import boto3

      boto3.client("s3").create_bucket(Bucket=name)
    else:
      request = urllib.request.Request(
        f"{self.gcs}/storage/v1/b?project=test",
        f'{{"name": "{name}"}}'.encode(),
        {"Content-Type": "application/json"},
      )
      urllib.request.urlopen(request).close()
    return f"{scheme}://{name}"

  def stop(self) -> None:
    self._s3.stop()
    with contextlib.suppress(Exception):
      self._gcs.stop()


@pytest.fixture(scope="session")
def stores():
  with pytest.MonkeyPatch.context() as patch:
    running = Stores(patch)
    yield running
    # The emulator waits for what it serves to end.
    threading.Thread(target=running.stop, daemon=True).start()


@pytest.fixture(params=SCHEMES)
def bucket(request, stores):
  """A new bucket, of each kind in turn."""
  return stores.bucket(request.param)

"""One server for all tests of clients."""

import dataclasses

import pytest

from tests import runs
from tests.serving import servers


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
  """An untrained network of letters that knows conversations."""
  folder = tmp_path_factory.mktemp("serving")
  file = folder / "tokenizer"
  file.mkdir()
  tokenizer = servers.letters()
  tokenizer.save(file)
  run = runs.run(
    folder / "run",
    data__tokenizer=str(file / "tokenizer.json"),
    data__length=servers.LENGTH,
  )
  run.start()
  return run


@pytest.fixture(scope="session")
def server(tiny_run):
  """A server that is ready."""
  running = servers.Running(tiny_run).start()
  yield running
  running.stop()


@pytest.fixture
def limits():
  return lambda **fields: dataclasses.replace(servers.LIMITS, **fields)

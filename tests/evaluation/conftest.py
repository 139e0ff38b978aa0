"""A tiny run that the tests of tasks share."""

import pytest

from tests import runs


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
  """A masked diffusion model of two steps."""
  workdir = tmp_path_factory.mktemp("evaluation") / "run"
  runs.run(workdir, training__steps=2).train()
  return workdir


@pytest.fixture(scope="session")
def judge(tmp_path_factory):
  """An autoregressive model of two steps."""
  workdir = tmp_path_factory.mktemp("evaluation") / "judge"
  fields = {"objective__name": "autoregressive", "training__steps": 2}
  runs.run(workdir, **fields).train()
  return workdir

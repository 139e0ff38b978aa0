"""The examples of docstrings run, and what people call first has one."""

import doctest
import inspect

import pytest

import dllm_jax
from dllm_jax import config
from dllm_jax.core.schedule import SCHEDULES
from dllm_jax.evaluation.likelihood import estimators
from dllm_jax.objectives import objective_class, objectives
from dllm_jax.sampling import policies, SamplerConfig
from tests import runs
from tests.pretrained import golden

POLICIES = ("Ancestral", "FirstHitting", "Unmasking", "ReMDM", "Psi", "Renoise")
THINGS = [
  *SCHEDULES.values(),
  *(objective_class(name) for name in sorted(objectives())),
  *(getattr(policies, name) for name in POLICIES),
  estimators.choose,
  estimators.calls,
  estimators.nats,
  SamplerConfig,
  config.load,
]


def check(thing, **names) -> int:
  """Runs a thing's example; returns how many lines it has."""
  module = inspect.getmodule(thing)
  [test] = doctest.DocTestFinder(recurse=False).find(
    thing, thing.__name__, module, extraglobs=names
  )
  out = []
  result = doctest.DocTestRunner().run(test, out=out.append)
  assert not result.failed, "".join(out)
  return result.attempted


@pytest.mark.parametrize("thing", THINGS, ids=lambda thing: thing.__name__)
def test_example(thing):
  assert check(thing)


@pytest.mark.all  # by .ci/run at every change
def test_example_of_a_run(tmp_path):
  names = {"workdir": tmp_path / "run", "resolved": runs.tiny(mesh__data=-1)}
  assert check(dllm_jax.Run, **names)


def test_example_of_a_published_folder(tmp_path):
  folder = golden.publish("llada_logits", tmp_path / "folder")
  assert check(dllm_jax.load_pretrained, folder=folder)


def test_an_example_that_is_wrong_is_found():
  def wrong():
    """Returns nothing.

    Examples:
      >>> 1 + 1
      3
    """

  with pytest.raises(AssertionError, match="Expected"):
    check(wrong)

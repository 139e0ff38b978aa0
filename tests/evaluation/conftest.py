"""A tiny run that the tests of tasks share."""

import jax
import pytest
import tokenizers

from dllm_jax.run.run import Run
from tests import runs

_OPEN = Run.open


@pytest.fixture(scope="module", autouse=True)
def one_device():
  """Opens runs on one device: simulated others only cost time here."""
  devices = jax.devices()[:1]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Run, "open", lambda path: _OPEN(path, devices=devices))
    yield


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


@pytest.fixture(scope="session")
def spanning(tmp_path_factory):
  """A tokenizer with Ans, wer and Answer, one token each."""
  folder = tmp_path_factory.mktemp("spanning")
  letters = " Answer"
  merges = [("A", "n"), ("An", "s"), ("w", "e"), ("we", "r"), ("Ans", "wer")]
  words = dict.fromkeys([*letters, *(a + b for a, b in merges)])
  vocabulary = {word: i for i, word in enumerate(words)}
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
  made.save(str(folder / "tokenizer.json"))
  return folder

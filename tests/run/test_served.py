"""What is imported and read to sample a run, and what is not."""

import functools
import math
import os
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from dllm_jax.config import config as configs
from dllm_jax.run.run import Run
from dllm_jax.sampling.generator import Generator
from dllm_jax.training.checkpoint import Checkpoints
from tests import runs


def imported(code: str) -> set[str]:
  """Returns the packages that a new Python has imported after some code."""
  done = subprocess.run(
    [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
    capture_output=True,
    text=True,
    check=True,
    cwd=runs.ROOT,
  )
  return set(done.stdout.splitlines()[-1].split())


def test_help_imports_nothing_that_it_does_not_need():
  found = imported("from dllm_jax.cli.main import main\nmain(['--help'])")
  assert not found & {"jax", "numpy", "importlib.metadata"}
  assert "dllm_jax.cli.main" in found


@pytest.mark.all
def test_what_samples_a_run_imports_no_data_and_no_log():
  found = imported("import dllm_jax.run.run, dllm_jax.cli.commands.sample")
  wrong = {
    "grain",
    "tensorboardX",
    "matplotlib",
    "jinja2",
    "safetensors",
    "scipy",
  }
  wrong |= {"dllm_jax.data.corpus", "dllm_jax.training.loop"}
  assert "dllm_jax.run.run" in found and not found & wrong


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  run = runs.run(tmp_path_factory.mktemp("served") / "run")
  run.train()
  return run


def test_no_optimiser_state_is_read(trained, monkeypatch):
  read, asked = Checkpoints._load, []

  def load(self, step, wanted, **how):
    asked.extend(wanted.get("state") or ())
    return read(self, step, wanted, **how)

  monkeypatch.setattr(Checkpoints, "_load", load)
  state = Run.open(trained.workdir, devices=jax.devices()[:1]).state
  assert state.opt_state is None and "params" in asked
  assert "opt_state" not in asked
  for name in ("params", "ema_params"):
    ours, theirs = getattr(state, name), getattr(trained.state, name)
    for a, b in zip(
      jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True
    ):
      np.testing.assert_array_equal(a, b)


def test_nothing_of_the_train_step_is_made_to_sample(trained):
  run = Run.open(trained.workdir, devices=jax.devices()[:1])
  run.sample()
  assert "program" not in run.__dict__ and "served" in run.__dict__


@pytest.mark.parametrize("use_ema", [True, False])
@pytest.mark.parametrize("mesh", [{"data": 1}, {"fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("unroll", [1, 2])
def test_one_program_is_compiled_while_the_checkpoint_is_read(
  trained, mesh, use_ema, unroll, monkeypatch
):
  """What was compiled of shapes alone runs with what was read, parted or not."""
  stored = configs.stored

  def unrolled(workdir):
    given = stored(workdir)
    given.model.unroll = unroll
    return given

  monkeypatch.setattr(configs, "stored", unrolled)
  count = math.prod(mesh.values())
  run = Run.open(trained.workdir, mesh=mesh, devices=jax.devices()[:count])
  ask = functools.partial(run.sample, ["To be"], num_samples=count, seed=3)
  found = ask(use_ema=use_ema)
  (launcher,) = run.generator.launchers
  assert found.compile_seconds == launcher.compile_seconds > 0
  again = ask(use_ema=use_ema, state=run.state)
  assert launcher.programs() == 1 and again.compile_seconds == 0
  assert again.rows == found.rows


def test_a_sampler_is_traced_and_compiled_while_a_checkpoint_is_read(
  trained, monkeypatch
):
  """Each of the two waits for the other to be under way."""
  read, run_compiler = Checkpoints._load, Generator.compile
  reading, compiled = threading.Event(), threading.Event()

  def load(*args, **how):
    reading.set()
    assert compiled.wait(60)
    return read(*args, **how)

  def compile_(*args, **how):
    assert reading.wait(60)
    seconds = run_compiler(*args, **how)
    compiled.set()
    return seconds

  monkeypatch.setattr(Checkpoints, "_load", load)
  monkeypatch.setattr(Generator, "compile", compile_)
  run = Run.open(trained.workdir, devices=jax.devices()[:1])
  assert len(run.sample(["To be"]).texts) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_ends_a_compiler_waits_for_no_checkpoint(
  trained, monkeypatch, error
):
  reading, ended = threading.Event(), threading.Event()

  def load(*args, **how):
    reading.set()
    assert ended.wait(60)
    raise FileNotFoundError

  def compile_(*args, **how):
    assert reading.wait(60)
    raise error

  monkeypatch.setattr(Checkpoints, "_load", load)
  monkeypatch.setattr(Generator, "compile", compile_)
  run = Run.open(trained.workdir, devices=jax.devices()[:1])
  with pytest.raises(error):
    run.sample(["To be"])
  (reader,) = (t for t in threading.enumerate() if t.name == "started")
  assert reader.daemon  # or the end of the process would wait
  ended.set()
  reader.join()


def test_nothing_is_compiled_for_a_run_without_a_checkpoint(tmp_path):
  run = runs.run(tmp_path / "run")
  with pytest.raises(FileNotFoundError, match="no checkpoint yet; train it"):
    run.sample()
  assert not run.generator.launchers


@pytest.fixture
def interruptible():
  """Ctrl-C, which a shell's background jobs are told to ignore."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_what_reads_a_checkpoint(trained, monkeypatch):
  """It is no damaged file, and is not lost in an event loop."""
  with Checkpoints(trained.workdir, writes=False) as checkpoints:
    reader = checkpoints._checkpointer
    read = reader.load_checkpointables

    def load(*args):
      assert threading.current_thread() is not threading.main_thread()
      os.kill(os.getpid(), signal.SIGINT)
      return read(*args)

    monkeypatch.setattr(reader, "load_checkpointables", load)
    with pytest.raises(KeyboardInterrupt):
      checkpoints.restore(trained.served.abstract)

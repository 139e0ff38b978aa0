"""The command line: last lines, exit statuses, messages of one line."""

import json
import os
import subprocess
import sys

import pytest

from dllm_jax.cli import main as cli_main
from dllm_jax.cli.main import main
from tests import runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A working directory with a space in its name, trained by the command."""
  workdir = tmp_path_factory.mktemp("cli") / "my run"
  status = main([
    "train",
    "--config=configs/smoke.py",
    f"--workdir={workdir}",
    "--config.training.steps=4",
    "--config.model.width=16",
    "--config.evaluation.batches=2",
    "--config.logging.progress=false",
  ])
  assert status == 0
  return workdir


def last_line(capsys):
  return json.loads(capsys.readouterr().out.splitlines()[-1])


def error(capsys) -> str:
  """Returns the one line that a mistake prints."""
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1, lines
  return lines[0]


@pytest.mark.all
def test_train_again_is_done_at_once(trained, capsys):
  assert main(["train", f"--workdir={trained}"]) == 0
  result = last_line(capsys)
  assert result["step"] == 4
  assert {
    "loss_nats_per_token",
    "eval_bits_per_token",
    "tokens_per_second",
  } <= result.keys()


@pytest.mark.all
def test_sample_prompt_infill_and_trace(trained, capsys, tmp_path):
  page = tmp_path / "unmasking.html"
  args = ["sample", f"--workdir={trained}", "--sampler.steps=4"]
  assert main([*args, "--prompt=To be", f"--trace={page}"]) == 0
  result = last_line(capsys)
  assert result["samples"][0].startswith("To be")
  assert len(result["samples"][0]) == 64
  # Fewer where a row has nothing masked left before its last step.
  assert 3 <= result["function_evaluations"] <= 4
  assert result["tokens_per_second"] > 0 and result["compile_seconds"] >= 0
  text = page.read_text()
  assert "<html" in text and "http" not in text.replace("http-equiv", "")
  assert main([*args, "--infill=To be [MASK*8] not"]) == 0
  sample = last_line(capsys)["samples"][0]
  assert sample.startswith("To be ") and sample.endswith(" not")
  assert len(sample) == len("To be  not") + 8 and "\u2581" not in sample


@pytest.mark.all
def test_samples_do_not_depend_on_their_number(trained, capsys):
  args = ["sample", f"--workdir={trained}", "--seed=3", "--sampler.steps=8"]
  main([*args, "--num_samples=1"])
  alone = last_line(capsys)["samples"]
  main([*args, "--num_samples=3"])
  assert last_line(capsys)["samples"][0] == alone[0]


def test_evaluate_reports_bits_with_their_error(trained, capsys):
  args = ["evaluate", f"--workdir={trained}", "--task=likelihood"]
  assert main([*args, "--batches=2"]) == 0
  result = last_line(capsys)
  assert {
    "bits_per_token",
    "bits_per_char",
    "perplexity",
    "standard_error",
    "tokens",
  } <= result.keys()
  assert result["bits_per_char"] == result["bits_per_token"]  # characters
  assert 0 < result["standard_error"] < 1


def test_configs_lists_what_is_bundled(capsys):
  assert main(["configs"]) == 0
  assert "shakespeare" in last_line(capsys)["configs"]


@pytest.mark.all
def test_prepare_then_train_on_it(tmp_path, capsys):
  text = tmp_path / "a text.txt"
  text.write_text("To be, or not to be, that is the question.\n" * 60)
  assert (
    main([
      "prepare",
      f"--input={text}",
      "--tokenizer=byte",
      f"--output={tmp_path}/tokens",
      "--length=32",
      "--workers=1",
    ])
    == 0
  )
  result = last_line(capsys)
  assert result["documents"] == 1 and result["tokens"] >= 43 * 60
  assert (
    main([
      "train",
      "--config=smoke",
      f"--workdir={tmp_path}/run",
      f"--config.data.path={tmp_path}/tokens",
      "--config.data.length=32",
      "--config.data.tokenizer=byte",
      "--config.training.steps=2",
      "--config.evaluation.batches=1",
      "--config.logging.progress=false",
      "--config.model.width=16",
    ])
    == 0
  )
  assert last_line(capsys)["step"] == 2


@pytest.mark.parametrize(
  "args, words",
  [
    (["trian"], "legal: train"),
    (["train"], "--workdir must be given"),
    (["train", "--workdir=w"], "--config must be given"),
    (["train", "--workdir=w", "--config=nope"], "shakespeare"),
    (["train", "--workdir=w", "--config=smoke", "--wat=1"], "'wat'"),
    (["train", "--workdir=w", "--config=smoke", "extra"], "'extra'"),
    (
      ["train", "--workdir=w", "--config=smoke", "--config.training.stepz=1"],
      "did you mean 'steps'",
    ),
    (
      [
        "train",
        "--workdir=w",
        "--config=smoke",
        "--config.training.steps=many",
      ],
      "training.steps=many",
    ),
    (
      [
        "train",
        "--workdir=w",
        "--config=smoke",
        "--config.data.path=no such file",
      ],
      "no such file",
    ),
    (
      [
        "train",
        "--workdir=w",
        "--config=smoke",
        "--config.training.batch_size=12",
      ],
      "not divisible by the 8 devices",
    ),
    (
      ["train", "--workdir=w", "--config=smoke", "--config.mesh.data=3"],
      "multiply to 8",
    ),
    (
      [
        "train",
        "--workdir=w",
        "--config=shakespeare_bd3lm",
        "--config.objective.block_size=7",
      ],
      "divide the length 128",
    ),
    (
      ["train", "--workdir=w", "--config=smoke", "--config.mesh.tensor=8"],
      "k/kernel: dimension 2 of shape (2, 64, 4, 16) does not divide",
    ),
    (
      [
        "train",
        "--workdir=w",
        "--config=shakespeare_d3pm_uniform",
        "--config.objective.steps=0",
      ],
      "at least T = 1",
    ),
    (
      [
        "train",
        "--workdir=w",
        "--config=shakespeare_d3pm_uniform",
        "--config.objective.schedule.name=loglinear",
      ],
      "legal: linear, cosine, mutual_information",
    ),
    (
      [
        "train",
        "--workdir=w",
        "--config=smoke",
        "--config.mesh.context=8",
        "--config.data.length=36",
      ],
      "data.length = 36 is not divisible by the 8 devices",
    ),
    (["sample", "--workdir=w"], "no run in w"),
    (["sample", "--preset=llada"], "did you mean --sampler.preset?"),
    (["evaluate", "--workdir=w"], "no run in w"),
    (["evaluate", "--workdir=w", "--task=taste"], "likelihood"),
    (["benchmark"], "dllm benchmark train"),
    (["prepare", "--input=nope", "--output=o"], "nope"),
  ],
)
def test_mistakes_exit_2_with_one_line(
  args, words, capsys, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  assert main(args) == 2
  assert words in error(capsys)
  assert not any(tmp_path.iterdir())  # nothing was written


@pytest.mark.parametrize(
  "content, words", [(b"", "empty"), (b"\xff\xfe\xfa" * 50, "UTF-8")]
)
def test_bad_text(content, words, capsys, tmp_path):
  (tmp_path / "text.txt").write_bytes(content)
  assert (
    main([
      "train",
      "--config=smoke",
      f"--workdir={tmp_path}/w",
      f"--config.data.path={tmp_path}/text.txt",
    ])
    == 2
  )
  assert words in error(capsys)


def test_other_configuration_in_the_directory(trained, capsys):
  before = sorted((trained / "checkpoints").iterdir())
  assert (
    main([
      "train",
      "--config=smoke",
      f"--workdir={trained}",
      "--config.training.steps=4",
      "--config.model.width=32",
      "--config.evaluation.batches=2",
    ])
    == 2
  )
  assert "config.model.width: 16 -> 32" in error(capsys)
  assert sorted((trained / "checkpoints").iterdir()) == before


def test_prompt_longer_than_the_canvas(trained, capsys):
  assert main(["sample", f"--workdir={trained}", "--prompt=" + "x" * 65]) == 2
  assert "64" in error(capsys)


def test_character_that_the_tokenizer_does_not_know(trained, capsys):
  assert main(["sample", f"--workdir={trained}", "--prompt=\u00e9"]) == 2
  assert "\u00e9" in error(capsys)


def test_help_of_every_command(capsys):
  from dllm_jax.cli.main import _COMMANDS

  assert main(["--help"]) == 0
  text = capsys.readouterr().out
  for name in _COMMANDS:
    assert name in text
    assert main([name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: dllm {name}")


def test_help_fits_a_small_terminal(capsys, monkeypatch):
  monkeypatch.setenv("COLUMNS", "50")
  assert main(["sample", "--help"]) == 0
  assert max(map(len, capsys.readouterr().out.splitlines())) <= 50


def _may_mount(directory) -> bool:
  done = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", directory],
    capture_output=True,
    check=False,
  )
  return done.returncode == 0


@pytest.mark.all
def test_full_disk_loses_nothing(tmp_path, capfd):
  """On a file system of 3 MB: status 1, one line, the last save readable."""
  disk = tmp_path / "disk"
  disk.mkdir()
  if os.geteuid() != 0 or not _may_mount(disk):
    pytest.skip("mounting a small file system needs root")
  try:
    status = main([
      "train",
      "--config=configs/smoke.py",
      f"--workdir={disk}/run",
      "--config.logging.tensorboard=false",
      "--config.logging.progress=false",
      "--config.checkpoint.every_steps=2",
      "--config.checkpoint.keep=9",
      "--config.training.steps=18",
      "--config.evaluation.batches=1",
    ])
    lines = capfd.readouterr().err.strip().splitlines()
    assert status == 1
    assert [line for line in lines if line.startswith("dllm:")] == lines
    assert "disk is full" in lines[0]
    run = runs.Run.open(disk / "run")
    assert int(run.state.step) >= 2
  finally:
    subprocess.run(["umount", disk], check=True)


def test_a_command_that_is_close_is_told(capsys):
  assert main(["serv"]) == 2
  assert (
    "unknown command 'serv'; did you mean 'serve'?" in capsys.readouterr().err
  )


@pytest.mark.parametrize(
  "said",
  ["RESOURCE_EXHAUSTED: Out of memory", "INTERNAL: Out of memory allocating 9"],
)
def test_memory_that_is_too_small_is_one_line(said, capsys, monkeypatch):
  def full(*_):
    raise RuntimeError(said)

  monkeypatch.setattr(cli_main, "_run", full)
  assert main(["serve"]) == 1
  err = capsys.readouterr().err
  assert err.count("\n") == 1 and "--slots" in err and said in err


def test_an_interrupted_command_does_not_wait_for_what_is_computed():
  """An ordinary exit waits for it, or takes its arrays away under it.

  Its worker, which holds the output open, is ended, too.
  """
  code = """if True:
    import multiprocessing
    import time

    import jax
    from dllm_jax.cli import main

    turn = lambda i, x: x @ x * 1e-3
    long = jax.jit(lambda x: jax.lax.fori_loop(0, 10_000, turn, x))

    def interrupted():
      worker = multiprocessing.Process(target=time.sleep, args=(60,))
      worker.start()
      long(jax.numpy.ones((1000, 1000)))  # is under way, for a minute
      return 130

    if __name__ == "__main__":
      multiprocessing.set_start_method("fork")
      main.main = interrupted
      main.console()
  """
  command = [sys.executable, "-c", code]
  done = subprocess.run(command, stdout=subprocess.PIPE, timeout=40)
  assert done.returncode == 130

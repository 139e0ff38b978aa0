"""A tiny DiffusionGemma, trained here, writes offline and behind a server."""

import json
import subprocess
import sys

import pytest

from dllm_jax.run.run import Run
from dllm_jax.sampling.presets import SamplerConfig
from tests.serving import servers

STEPS = 400


def said(*argv):
  """Returns the last line of a command, a process of its own."""
  line = [sys.executable, "-m", "dllm_jax", *argv]
  done = subprocess.run(line, capture_output=True, text=True, check=True)
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.all
def test_a_tiny_model_writes_offline_and_served(tmp_path):
  workdir = tmp_path / "run"
  fields = {
    "training.steps": STEPS,
    "data.length": 64,
    "model.width": 64,
    "model.layers": 2,
    "model.unroll": 2,
    "model.heads": 2,
    "model.expert_dim": 64,
    "evaluation.sample_every": 0,
    "evaluation.every_steps": 0,
    "logging.progress": "false",
  }
  given = [f"--config.{name}={value}" for name, value in fields.items()]
  config = "--config=configs/shakespeare_diffusion_gemma.py"
  result = said("train", config, f"--workdir={workdir}", *given)
  # Frequencies alone are 4.8 bits; a network that knows nothing says 6.02.
  assert 0 < result["eval_bits_per_token"] < 5.5

  new = 32
  argv = ("sample", f"--workdir={workdir}", "--prompt=ROMEO:")
  made = said(*argv, f"--new_tokens={new}", "--num_samples=4")["samples"]
  written = "".join(text.removeprefix("ROMEO:") for text in made)
  assert len(written) >= 3 * new
  # As English does, and no uniform characters: blanks, small letters, vowels.
  letters = [c for c in written if c.isalpha()]
  assert sum(c.islower() for c in letters) > 0.7 * len(letters)
  assert sum(c in "aeiou" for c in letters) > 0.25 * len(letters)
  assert written.count(" ") + written.count("\n") > 0.1 * len(written)

  run = Run.open(workdir)
  running = servers.Running(
    run, sampler=SamplerConfig(preset="diffusion_gemma", steps=8), length=48
  ).start()
  try:
    body = {
      "model": servers.NAME,
      "prompt": "ROMEO:",
      "max_tokens": 20,
      "seed": servers.SEED,
    }
    status, _, told = servers.send(f"{running.url}/v1/completions", body)
    assert status == 200, told
    text = told["choices"][0]["text"]
    assert len(text) == 20
    (row,) = run.sample_rows(
      [[*map(int, run.tokenizer.prompt("ROMEO:")), *[None] * 20]],
      length=48,
      numbers=[0],
      sampler=running.sampler,
      options=[servers.RowOptions(seed=servers.SEED)],
    ).rows
    assert text == run.tokenizer.decode(row[6:])
    status, _, told = servers.send(
      f"{running.url}/v1/completions", body | {"block_length": 8}
    )
    assert status == 400 and "block_length" in told["error"]["message"]
  finally:
    running.stop()

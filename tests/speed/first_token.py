"""The first text of an imported model, beside loading it and compiling once.

    python -m tests.speed.first_token

Makes a folder as `loading` does, 1.07 GB of bfloat16, with a tokenizer of bytes,
and a run of it by `dllm convert`. Then `dllm sample` of 32 tokens in two calls of
the network, each time in a new process with no compiled programs kept. Prints JSON:
seconds from the start of the process to its end, of which those that load the
checkpoint and those that trace and compile the sampler, and how many times the sum
of these two all is: medians of the rounds.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from tests.speed import loading

FIELDS = ("--new_tokens=32", "--sampler.steps=2", "--sampler.block_length=32")


def _tokenizer(folder: pathlib.Path) -> None:
  import tokenizers

  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  vocab = {letter: i for i, letter in enumerate(alphabet)}
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  made.decoder = tokenizers.decoders.ByteLevel()
  made.save(str(folder / "tokenizer.json"))


def measure(workdir: str) -> None:
  """Samples as the command does, and prints seconds of its parts."""
  from dllm_jax.cli import main as cli
  from dllm_jax.run.run import Run
  from dllm_jax.sampling.launch import Launcher

  seconds = {}

  def timed(owner, name, key):
    function = getattr(owner, name)

    def call(*args, **fields):
      start = time.perf_counter()
      found = function(*args, **fields)
      seconds[key] = seconds.get(key, 0.0) + time.perf_counter() - start
      return found

    setattr(owner, name, call)

  timed(Run, "load", "load")
  timed(Launcher, "compile", "compile")
  sys.argv = ["dllm", "sample", f"--workdir={workdir}", "--prompt=To", *FIELDS]
  try:
    cli.main()
  finally:
    print("\n" + json.dumps(seconds))


def _round(workdir: pathlib.Path) -> dict[str, float]:
  with tempfile.TemporaryDirectory() as kept:
    start = time.perf_counter()
    done = subprocess.run(
      [sys.executable, "-m", __spec__.name, "--measure", str(workdir)],
      env=os.environ | {"JAX_COMPILATION_CACHE_DIR": kept},
      stdout=subprocess.PIPE,
      text=True,
      check=True,
    )
    whole = time.perf_counter() - start
  parts = json.loads(done.stdout.splitlines()[-1])
  both = parts["load"] + parts["compile"]
  return {"all": whole, **parts, "all_over_both": whole / both}


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rounds", type=int, default=5)
  rounds = parser.parse_args().rounds
  with tempfile.TemporaryDirectory() as root:
    folder, workdir = pathlib.Path(root) / "folder", pathlib.Path(root) / "run"
    loading.write(folder, loading.CONFIG)
    _tokenizer(folder)
    convert = ["convert", f"--from_hf={folder}", f"--workdir={workdir}"]
    subprocess.run(
      [sys.executable, "-m", "dllm_jax", *convert],
      stdout=subprocess.DEVNULL,
      check=True,
    )
    found = [_round(workdir) for _ in range(rounds)]
  medians = {k: statistics.median(one[k] for one in found) for k in found[0]}
  print(json.dumps({"medians": medians, "rounds": found}, indent=2))


if __name__ == "__main__":
  if sys.argv[1:2] == ["--measure"]:
    measure(sys.argv[2])
  else:
    main()

"""The first text of an imported model, beside loading it and compiling once.

    python -m tests.speed.first_token

Makes a folder as `loading` does, 1.07 GB of bfloat16, with a tokenizer of bytes,
and a run of it by `dllm convert`. Then two new processes take turns, neither with
compiled programs kept: `dllm sample` of 32 tokens in two calls of the network,
timed from its start until it has written the text, and one that loads the
checkpoint and then traces and compiles the same sampler, with nothing beside, each
timed alone. Prints JSON: the seconds of each, and how many times the sum of the
last two the first is, medians of the rounds.
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
  """Loads, then compiles, and prints seconds of each."""
  import dataclasses

  from dllm_jax.run.run import Run

  run = Run.open(workdir)
  made = run.generator
  given = dict(steps=2, block_length=32)
  plan = made.plan(
    made.templates(["To"], new_tokens=32),
    length=None,
    sampler=dataclasses.replace(run.config.sampler, **given),
  )
  _ = run.served
  start = time.perf_counter()
  state = run.load()
  loaded = time.perf_counter()
  params = state.params
  process = state.process.replace(params=params["process"])
  made.compile(params["model"], process, plan)
  done = time.perf_counter()
  print(json.dumps({"load": loaded - start, "compile": done - loaded}))


def _timed(*command: str) -> tuple[float, str]:
  """Returns seconds until a line is written, and the last line of all."""
  with tempfile.TemporaryDirectory() as kept:
    start = time.perf_counter()
    process = subprocess.Popen(
      [sys.executable, "-m", *command],
      env=os.environ | {"JAX_COMPILATION_CACHE_DIR": kept},
      stdout=subprocess.PIPE,
      text=True,
    )
    line = process.stdout.readline()
    seconds = time.perf_counter() - start
    rest = process.communicate()[0]
  if process.returncode:
    raise SystemExit(f"{command} ended with status {process.returncode}")
  return seconds, (rest or line).splitlines()[-1]


def _round(workdir: pathlib.Path) -> dict[str, float]:
  where = f"--workdir={workdir}"
  first, _ = _timed("dllm_jax", "sample", where, "--prompt=To", *FIELDS)
  parts = json.loads(_timed(__spec__.name, "--measure", str(workdir))[1])
  both = parts["load"] + parts["compile"]
  return {"first_text": first, **parts, "over_both": first / both}


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

"""Time that commands take to begin, each in a new process.

    python tests/speed/startup.py --workdir=runs/demo

`dllm --help`, `dllm sample` of a run and a second start of its training, up to
its first step, all with programs that were compiled before: one start of each
fills the cache and is not counted. The run itself is left as it is: training goes
on in copies. Prints JSON: seconds of each round and medians, beside those of
Python alone and of `import jax` alone, in turns.
"""

import argparse
import json
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

DLLM = [sys.executable, "-m", "dllm_jax"]


def seconds(command: list[str]) -> float:
  """Returns the time that a command takes from its start to its end."""
  start = time.perf_counter()
  subprocess.run(command, capture_output=True, check=True)
  return time.perf_counter() - start


def first_step(workdir: pathlib.Path) -> float:
  """Returns the time from the start of a second training to its first step."""
  with tempfile.TemporaryDirectory() as root:
    copy = pathlib.Path(root) / "run"
    shutil.copytree(workdir, copy)
    newest = max(int(p.name) for p in (copy / "checkpoints").iterdir())
    fields = {
      "training.steps": newest + 3,
      "logging.every_steps": 1,
      "logging.progress": "false",
    }
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    lines = copy / "metrics.jsonl"
    start = time.perf_counter()
    process = subprocess.Popen(
      [*DLLM, "train", f"--workdir={copy}", *flags],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    # A step is told when the next has begun: its own end is a step earlier.
    pattern = re.compile(rf'"step": {newest + 1}\b')
    while process.poll() is None:
      if pattern.search(lines.read_text()):
        break
      time.sleep(0.01)
    found = time.perf_counter() - start
    if process.wait():
      raise SystemExit("the second start of the training failed")
    return found


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--rounds", type=int, default=5)
  args = parser.parse_args()
  measures = {
    "python": lambda: seconds([sys.executable, "-c", ""]),
    "import_jax": lambda: seconds([sys.executable, "-c", "import jax"]),
    "help": lambda: seconds([*DLLM, "--help"]),
    "sample": lambda: seconds([*DLLM, "sample", f"--workdir={args.workdir}"]),
    "first_step": lambda: first_step(args.workdir),
  }
  for measure in measures.values():
    measure()
  rounds = [
    {name: measure() for name, measure in measures.items()}
    for _ in range(args.rounds)
  ]
  medians = {k: statistics.median(r[k] for r in rounds) for k in measures}
  print(json.dumps({"seconds": medians, "rounds": rounds}, indent=2))


if __name__ == "__main__":
  main()

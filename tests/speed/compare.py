"""Speed of the library's train step beside PyTorch's and plain JAX's.

    python tests/speed/compare.py --torch=TORCHENV/bin/python

TORCHENV is an environment of its own with `pip install torch==2.13.0 numpy`;
`torch.compile` also needs a C++ compiler. The programs run as processes that
answer in turns, so that what else the machine does weighs on all alike; while
one runs the others wait for input.
Before any is timed, their losses on one batch and one set of parameters must
agree. Prints JSON; ratios are medians over the rounds.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile

import shape

HERE = pathlib.Path(__file__).parent
TOLERANCE = 1e-4


class Program:
  """A process that answers commands (`worker`)."""

  def __init__(self, python: str, script: str, *arguments: str | pathlib.Path):
    self._process = subprocess.Popen(
      [python, HERE / script, *arguments],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )

  def ask(self, command: str) -> float:
    """Returns the answer."""
    self._process.stdin.write(command + "\n")
    self._process.stdin.flush()
    line = self._process.stdout.readline()
    if not line:
      raise SystemExit(f"{self._process.args[1]} ended by itself")
    return float(line)

  def close(self) -> None:
    """Ends the process."""
    self._process.stdin.close()
    self._process.wait()


def main() -> None:
  """Runs the programs and prints what was found."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--torch", required=True, help="a Python with PyTorch")
  parser.add_argument("--steps", type=int, default=5, help="a round")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument(
    "--microbatches", type=int, default=4, help="of the library's step"
  )
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as directory:
    batch = str(pathlib.Path(directory) / "batch.npz")
    commands = {
      "library": (
        sys.executable,
        "library_step.py",
        batch,
        str(args.microbatches),
      ),
      "torch": (args.torch, "torch_step.py", batch),
      "torch_compile": (args.torch, "torch_step.py", batch, "compile"),
      "plain": (sys.executable, "plain_step.py", batch),
    }
    programs, losses = {}, {}
    for name, command in commands.items():
      programs[name] = Program(*command)
      losses[name] = programs[name].ask("loss")
    if max(losses.values()) - min(losses.values()) > TOLERANCE:
      raise SystemExit(f"not one network: the losses are {losses}")
    for program in programs.values():
      program.ask("steps 2")
    rounds = [
      {k: p.ask(f"steps {args.steps}") for k, p in programs.items()}
      for _ in range(args.rounds)
    ]
    for program in programs.values():
      program.close()
  seconds = {
    k: statistics.median(r[k] for r in rounds) / args.steps for k in programs
  }
  tokens = shape.BATCH * shape.LENGTH
  faster = lambda k: statistics.median(r[k] / r["library"] for r in rounds)
  print(
    json.dumps(
      {
        "losses": losses,
        "step_milliseconds": {k: 1000 * s for k, s in seconds.items()},
        "tokens_per_second": {k: tokens / s for k, s in seconds.items()},
        **{f"library_over_{k}": faster(k) for k in programs if k != "library"},
        "rounds": rounds,
      },
      indent=2,
    )
  )


if __name__ == "__main__":
  main()

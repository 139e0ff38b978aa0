"""Speed of DiffusionGemma's sampler beside transformers', on one random network.

    python tests/speed/gemma.py --torch=TORCHENV/bin/python [--rows=1]

TORCHENV is an environment of its own with `pip install torch==2.13.0
transformers==5.24.0 numpy`. It writes a folder of random weights
(`gemma_torch.FIELDS`), and both programs read it: 64 tokens of prompt, two
canvases, as many calls for each canvas in both, since neither stops early.

Both run as processes that answer in turns. Before any is timed, their logits of
one canvas behind a prompt must agree. Tokens are not compared: the two draw
their own noise, and `tests/sampling/test_parity_gemma.py` replays recorded
generations. Prints JSON; the ratio is the median over the rounds.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile

from compare import Program
import numpy as np

TOLERANCE = 1e-3


def main() -> None:
  """Runs the programs and prints what was found."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--torch", required=True, help="a Python with PyTorch")
  parser.add_argument("--rows", type=int, default=1)
  parser.add_argument("--rounds", type=int, default=5)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as directory:
    folder = pathlib.Path(directory)
    commands = {
      "torch": (args.torch, "gemma_torch.py"),
      "library": (sys.executable, "gemma_library.py"),
    }
    programs, tokens = {}, {}

    def ask(name, kind):
      path = folder / f"{name}.npy"
      return programs[name].ask(f"generate {kind} {args.rows} {path}")

    for name, (python, script) in commands.items():
      programs[name] = Program(python, script, folder / "model")
      ask(name, "logits")
    logits = [np.load(folder / f"{name}.npy") for name in commands]
    gap = float(np.abs(logits[0] - logits[1]).max())
    if gap > TOLERANCE:
      raise SystemExit(f"not one network: logits differ by {gap}")
    for name in commands:
      ask(name, "tokens")
      tokens[name] = np.load(folder / f"{name}.npy").shape
    if len(set(tokens.values())) > 1:
      raise SystemExit(f"not as many tokens: {tokens}")
    rounds = [
      {name: ask(name, "tokens") for name in commands}
      for _ in range(args.rounds)
    ]
    for program in programs.values():
      program.close()
  new = int(np.prod(tokens["library"]))
  print(
    json.dumps(
      {
        "logits_differ_by": gap,
        "new_tokens": new,
        "tokens_per_second": {
          name: new / statistics.median(r[name] for r in rounds)
          for name in commands
        },
        "library_over_torch": statistics.median(
          r["torch"] / r["library"] for r in rounds
        ),
        "rounds": rounds,
      },
      indent=2,
    )
  )


if __name__ == "__main__":
  main()

"""Speed of the library's decoding beside Fast-dLLM's, on one random network.

    python tests/speed/decode.py --torch=TORCHENV/bin/python \
        --fast_dllm=FAST_DLLM [--kind=none] [--rows=8] [--dtype=bfloat16] [--tiny]

TORCHENV is an environment of its own with `pip install torch==2.13.0 numpy`,
FAST_DLLM a checkout of NVlabs/Fast-dLLM, whose functions generate as they are:
`generate_with_dual_cache`, or `generate`, LLaDA's, without a cache. Several
rows are given to it at once and one after another, and the faster counts. The
library's engine has them too, all at once, and so has `dllm serve`'s HTTP, as
streams that as many clients read: what a server that answers one request at a
time takes is Fast-dLLM's one row after another (`served_over_torch_alone`). The
network is that of `configs/benchmark_sampler.py`, which also says how blocks
are revealed; `--tiny` takes a small one, to see whether all of it runs.

Both programs run as processes that answer in turns. They must first generate
the same tokens; float32 sums that tie but for rounding may part them, as a
thousandth of the tokens at the most. In bfloat16 roundings part most rows sooner or
later, and no tokens are compared. Prints JSON; ratios are medians over the rounds.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile

from compare import Program
import numpy as np

# Of a tiny network's tokens many are about as likely, and a row that is parted
# once stays so.
PARTED = {"whole": 1e-3, "tiny": 0.5}


def main() -> None:
  """Runs the programs and prints what was found."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--torch", required=True, help="a Python with PyTorch")
  parser.add_argument("--fast_dllm", required=True, help="its checkout")
  parser.add_argument("--kind", choices=("dual", "none"), default="dual")
  parser.add_argument("--rows", type=int, default=1)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument(
    "--dtype", choices=("float32", "bfloat16"), default="float32"
  )
  parser.add_argument("--tiny", action="store_true", help="measures nothing")
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as directory:
    folder = pathlib.Path(directory)
    exchange = folder / "exchange.npz"
    ways = {"library": ("library", args.kind), "torch": ("torch", args.kind)}
    if args.rows > 1 and args.kind == "dual":
      ways["torch_alone"] = ("torch", "alone")
      ways |= {way: ("library", way) for way in ("engine", "served")}
    size = "tiny" if args.tiny else "whole"
    programs = {
      "library": Program(
        sys.executable,
        "decode_library.py",
        exchange,
        str(args.rows),
        size,
        args.dtype,
      )
    }

    def generate(way):
      name, kind = ways[way]
      path = folder / f"{way}.npy"
      return programs[name].ask(f"generate {kind} {args.rows} {path}")

    generate("library")
    programs["torch"] = Program(
      args.torch, "decode_torch.py", exchange, args.fast_dllm
    )
    for way in ways:
      generate(way)
    tokens = {way: np.load(folder / f"{way}.npy") for way in ways}
    with np.load(exchange) as data:
      new = args.rows * int(data["length"] - data["prompts"].shape[1])
    for way, found in tokens.items():
      parted = np.count_nonzero(found != tokens["library"])
      if args.dtype == "float32" and parted > PARTED[size] * new:
        raise SystemExit(f"library and {way} part at {parted} of {new} tokens")
    rounds = [{way: generate(way) for way in ways} for _ in range(args.rounds)]
    for program in programs.values():
      program.close()
  seconds = {k: statistics.median(r[k] for r in rounds) for k in ways}
  theirs = min((k for k in ways if "torch" in k), key=seconds.get)
  ratios = {
    f"{way}_over_torch_alone": statistics.median(
      r["torch_alone"] / r[way] for r in rounds
    )
    for way in ("engine", "served")
    if way in ways
  }
  print(
    json.dumps(
      {
        "tokens_per_second": {k: new / s for k, s in seconds.items()},
        **ratios,
        "library_over_torch": statistics.median(
          r[theirs] / r["library"] for r in rounds
        ),
        "rounds": rounds,
      },
      indent=2,
    )
  )


if __name__ == "__main__":
  main()

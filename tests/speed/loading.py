"""Rate at which a published folder is read, beside `safetensors.numpy`.

    python -m tests.speed.loading

Makes a folder of LLaDA-8B's kind in bfloat16, of 1 GB in shards of 200 MB, and
reads it in new processes that take turns: `safetensors.numpy.load_file` of every
shard, whose arrays are kept, and `load_pretrained`. Both import all they need
and load a tiny folder first, which is not counted. Prints JSON: bytes a second,
their ratio as the median over the rounds, and the most memory of ours over the
weights, in units of the largest parameter.
"""

import argparse
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

CONFIG = {
  "model_type": "llada",
  "d_model": 2048,
  "n_layers": 6,
  "n_heads": 16,
  "mlp_hidden_size": 6144,
  "vocab_size": 50304,
  "rms_norm_eps": 1e-5,
  "mask_token_id": 50300,
}
TINY = {"d_model": 64, "n_layers": 2, "n_heads": 2, "mlp_hidden_size": 64}


def write(folder: pathlib.Path, config: dict) -> pathlib.Path:
  """Writes a folder of small random weights; returns it."""
  import ml_dtypes
  import numpy as np

  from dllm_jax.core.paths import Path
  from dllm_jax.pretrained import families, files, table

  folder = Path(folder)
  fields = families.Fields(config, folder)
  family = families.find(fields)
  bf16 = np.dtype(ml_dtypes.bfloat16)
  rng = np.random.default_rng(0)
  make = lambda shape: (
    lambda: (0.02 * rng.standard_normal(shape, np.float32)).astype(bf16)
  )
  folder.mkdir()
  files.write_json(folder / "config.json", config)
  places = table.places_of(family.table, family.network(fields))
  tensors = {
    k: files.Outgoing(bf16, v, make(v))
    for k, v in table.expected(places).items()
  }
  files.write_tensors(folder, tensors, shard_bytes=2 * 10**8)
  return pathlib.Path(folder)


def resident(name: str) -> int:
  """Returns a size of this process that the system tells, in bytes."""
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search(name + r":\s+(\d+) kB", status)[1]) * 1024


def _theirs(folder: pathlib.Path):
  from safetensors.numpy import load_file

  files = sorted(folder.glob("*.safetensors"))
  return [load_file(file) for file in files]


def _ours(folder: pathlib.Path):
  import jax

  from dllm_jax import load_pretrained

  return jax.block_until_ready(load_pretrained(folder).params)


def measure(how: str, tiny: pathlib.Path, large: pathlib.Path) -> None:
  """Prints seconds, bytes and memory of one reading."""
  import jax

  load = {"ours": _ours, "theirs": _theirs}[how]
  load(tiny)
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak
  before = resident("VmRSS")
  start = time.perf_counter()
  weights = load(large)
  seconds = time.perf_counter() - start
  sizes = [leaf.nbytes for leaf in jax.tree.leaves(weights)]
  over = resident("VmHWM") - before - sum(sizes)
  print(
    json.dumps({
      "seconds": seconds,
      "bytes": sum(sizes),
      "over_in_largest": over / max(sizes),
    })
  )


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--rounds", type=int, default=5)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as root:
    folders = [
      write(pathlib.Path(root) / "tiny", CONFIG | TINY),
      write(pathlib.Path(root) / "large", CONFIG),
    ]

    def one(how: str) -> dict[str, float]:
      done = subprocess.run(
        [sys.executable, "-m", __spec__.name, "--measure", how, *folders],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
      )
      return json.loads(done.stdout.splitlines()[-1])

    rounds = [
      {how: one(how) for how in ("theirs", "ours")} for _ in range(args.rounds)
    ]
  rate = lambda found: found["bytes"] / found["seconds"]
  median = statistics.median
  print(
    json.dumps(
      {
        "bytes": rounds[0]["ours"]["bytes"],
        "bytes_per_second": {
          how: median(rate(r[how]) for r in rounds) for how in rounds[0]
        },
        "ours_over_theirs": median(
          rate(r["ours"]) / rate(r["theirs"]) for r in rounds
        ),
        "most_memory_over_weights_in_largest_parameters": max(
          r["ours"]["over_in_largest"] for r in rounds
        ),
        "rounds": rounds,
      },
      indent=2,
    )
  )


if __name__ == "__main__":
  if sys.argv[1:2] == ["--measure"]:
    measure(sys.argv[2], *map(pathlib.Path, sys.argv[3:]))
  else:
    main()

"""Time to the first batch of a folder of `.jsonl.zst`, the start included.

    python -m tests.speed.first_batch --tokenizer=gpt2/tokenizer.json TEXT ...

Makes one compressed file of varied English documents (from texts as in
`tests.speed.prepare`) and a folder in which it lies so many times, by links, as
make the size asked for: opening and reading them costs what files of their own
would, the disk apart. Prints JSON: seconds of five starts of Python, each of
which loads the corpus and takes one batch, and the most memory.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

ROWS, LENGTH = 64, 1024


def _first(path: str, tokenizer: str) -> None:
  """Takes one batch; prints the megabytes that it took."""
  from dllm_jax import data

  corpus = data.load(
    data.Dataset(path=path, tokenizer=tokenizer, length=LENGTH, held_out=0.001)
  )
  batches = data.train_iterator(corpus, batch_size=ROWS, seed=0)
  assert next(batches).tokens.shape == (ROWS, LENGTH)
  batches.close()
  print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)


def _folder(root: pathlib.Path, args) -> tuple[pathlib.Path, int, int]:
  """Returns a folder, how many files it has and their bytes."""
  import pyarrow

  from tests.speed import prepare

  plain = root / "part.jsonl"
  texts = prepare._documents(args.texts, args.tokenizer)
  prepare._write(plain, texts, args.file_megabytes * 10**6)
  packed = root / "part.jsonl.zst"
  with (
    plain.open("rb") as source,
    pyarrow.CompressedOutputStream(str(packed), "zstd") as target,
  ):
    shutil.copyfileobj(source, target)
  plain.unlink()
  folder = root / "corpus"
  folder.mkdir()
  size = packed.stat().st_size
  count = -(-args.gigabytes * 10**9 // size)
  for i in range(count):
    os.link(packed, folder / f"part-{i:05}.jsonl.zst")
  return folder, count, count * size


def main() -> None:
  """Measures and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("texts", nargs="+", metavar="TEXT")
  parser.add_argument("--tokenizer", required=True)
  parser.add_argument("--gigabytes", type=int, default=20)
  parser.add_argument("--file_megabytes", type=int, default=300)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as root:
    folder, files, size = _folder(pathlib.Path(root), args)
    found = {"files": files, "gigabytes": size / 1e9}
    for tokenizer in ("byte", args.tokenizer):
      seconds, megabytes = [], []
      for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run(
          [sys.executable, "-m", __spec__.name, "--first", folder, tokenizer],
          stdout=subprocess.PIPE,
          text=True,
          check=True,
        )
        seconds.append(time.perf_counter() - start)
        megabytes.append(float(done.stdout.splitlines()[-1]))
      found[pathlib.Path(tokenizer).stem] = {
        "seconds": statistics.median(seconds),
        "all_seconds": seconds,
        "megabytes": max(megabytes),
      }
  print(json.dumps(found))


if __name__ == "__main__":
  if sys.argv[1:2] == ["--first"]:
    _first(*sys.argv[2:])
  else:
    main()

"""Speed of `dllm prepare` beside tokenizers alone and Hugging Face datasets.

    python tests/speed/prepare.py --tokenizer=gpt2/tokenizer.json TEXT ...

Makes JSONL of some size from English texts (`.txt`, or `.bin` of uint16 tokens
of that tokenizer with an end of text after each document; `.xz` or not): drawn
documents in which words are replaced by others, so that no document comes twice
and no cache of words has all of them. Then, in turns:

    bare      `encode_batch_fast` over the texts, which lie in memory
    prepare   `dllm prepare`, from the file to records, its start included
    datasets  `datasets.map(batched=True, num_proc=...)` with transformers' fast
              tokenizer, from Arrow to Arrow; reading the JSONL is not counted

Needs `pip install datasets transformers`. Prints JSON: seconds of each round,
and medians of the ratios of rounds: above 1 where `dllm prepare` is quicker.
`peak_megabytes` is the most memory (PSS) of all its processes together.
"""

import argparse
import json
import lzma
import os
import pathlib
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

BATCH = 256
ROOT = pathlib.Path(__file__).parents[2]


def _documents(names: list[str], tokenizer: str) -> list[str]:
  import numpy as np
  import tokenizers

  found = []
  for name in names:
    content = pathlib.Path(name).read_bytes()
    kind = pathlib.Path(name.removesuffix(".xz")).suffix
    if name.endswith(".xz"):
      content = lzma.decompress(content)
    if kind != ".bin":
      blocks = content.decode().split("\n\n")
      found += [
        "\n\n".join(blocks[i : i + 8]) for i in range(0, len(blocks), 8)
      ]
      continue
    model = tokenizers.Tokenizer.from_file(tokenizer)
    ids = np.frombuffer(content, np.uint16)
    end = model.token_to_id("<|endoftext|>")
    for part in np.split(ids, np.flatnonzero(ids == end)):
      found.append(model.decode(part[1:].tolist()))
  return [text for text in found if len(text) > 100]


def _write(path: pathlib.Path, texts: list[str], size: int) -> None:
  """Writes JSONL of varied documents; the same at every call."""
  words = sorted({word for text in texts for word in text.split()})
  rng = random.Random(0)
  written = 0
  with path.open("w", encoding="utf-8") as file:
    while written < size:
      text = rng.choice(texts).split(" ")
      for i in range(rng.randrange(12), len(text), 12):
        text[i] = rng.choice((
          rng.choice(words),
          rng.choice(words) + rng.choice(words).lower(),
          str(rng.randrange(10**6)),
        ))
      line = json.dumps({"text": " ".join(text), "id": written})
      written += file.write(line + "\n")


def _bare(path: str, tokenizer: str) -> float:
  import tokenizers

  with open(path, encoding="utf-8") as file:  # noqa: PTH123
    texts = [json.loads(line)["text"] for line in file]
  model = tokenizers.Tokenizer.from_file(tokenizer)
  start = time.perf_counter()
  for i in range(0, len(texts), BATCH):
    model.encode_batch_fast(texts[i : i + BATCH])
  return time.perf_counter() - start


def _datasets(path: str, tokenizer: str, processes: str) -> float:
  import datasets
  import transformers

  model = transformers.PreTrainedTokenizerFast(tokenizer_file=tokenizer)
  datasets.disable_progress_bars()
  with tempfile.TemporaryDirectory(dir=pathlib.Path(path).parent) as cache:
    texts = datasets.load_dataset(
      "json", data_files=path, split="train", cache_dir=cache
    )
    start = time.perf_counter()
    texts.map(
      lambda batch: {"input_ids": model(batch["text"])["input_ids"]},
      batched=True,
      num_proc=int(processes),
      remove_columns=texts.column_names,
    )
    return time.perf_counter() - start


def _apart(*call: str) -> float:
  """Runs a function of this file in a process, and returns what it returns."""
  done = subprocess.run(
    [sys.executable, __file__, "--call", *call],
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return float(done.stdout.splitlines()[-1])


def _prepare(path: str, tokenizer: str, processes: int) -> tuple[float, float]:
  """Returns the seconds and the megabytes of `dllm prepare`."""
  output = pathlib.Path(path).with_suffix(".prepared")
  shutil.rmtree(output, ignore_errors=True)
  start = time.perf_counter()
  process = subprocess.Popen(
    [
      *(sys.executable, "-m", "dllm_jax", "prepare", f"--input={path}"),
      *(f"--tokenizer={tokenizer}", f"--output={output}"),
      f"--workers={processes}",
    ],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  peak = 0.0
  while process.poll() is None:
    peak = max(peak, _megabytes(process.pid))
    time.sleep(0.2)
  if process.returncode:
    raise SystemExit(f"dllm prepare ended with status {process.returncode}")
  seconds = time.perf_counter() - start
  shutil.rmtree(output)
  return seconds, peak


def _megabytes(pid: int) -> float:
  """Returns the memory of a process and of those that it started."""
  here = pathlib.Path("/proc", str(pid))
  called = lambda path: (path / "cmdline").read_bytes()
  try:
    rollup = (here / "smaps_rollup").read_text()
    total = next(
      int(line.split()[1]) / 1000
      for line in rollup.splitlines()
      if line.startswith("Pss:")
    )
    for task in (here / "task").iterdir():
      for child in (task / "children").read_text().split():
        # One that has just begun is still its parent, memory included.
        if called(here.parent / child) != called(here):
          total += _megabytes(int(child))
  except (OSError, StopIteration):  # It has just ended.
    return 0.0
  return total


def main() -> None:
  """Runs the programs in turns and prints what was found."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("texts", nargs="+", metavar="TEXT")
  parser.add_argument("--tokenizer", required=True)
  parser.add_argument("--megabytes", type=int, default=1000)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--processes", type=int, default=2)
  args = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "corpus.jsonl"
    _write(path, _documents(args.texts, args.tokenizer), args.megabytes * 10**6)
    rounds, peaks = [], []
    for _ in range(args.rounds):
      seconds, peak = _prepare(str(path), args.tokenizer, args.processes)
      peaks.append(peak)
      rounds.append({
        "bare": _apart("_bare", str(path), args.tokenizer),
        "prepare": seconds,
        "datasets": _apart(
          "_datasets", str(path), args.tokenizer, str(args.processes)
        ),
      })
      print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
  ratio = lambda name: statistics.median(r[name] / r["prepare"] for r in rounds)
  print(
    json.dumps({
      "megabytes": args.megabytes,
      "megabytes_per_second": args.megabytes
      / statistics.median(r["prepare"] for r in rounds),
      "bare_to_prepare": ratio("bare"),
      "datasets_to_prepare": ratio("datasets"),
      "peak_megabytes": max(peaks),
      "rounds": rounds,
    })
  )


if __name__ == "__main__":
  if sys.argv[1:2] == ["--call"]:
    print(globals()[sys.argv[2]](*sys.argv[3:]))
  else:
    main()

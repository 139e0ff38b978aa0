"""Tokens a second of batches from Megatron files, on one core.

python -m tests.speed.token_files
"""

import os
import pathlib
import statistics
import tempfile
import time

import numpy as np

from dllm_jax import data
from tests.data import token_files

LENGTH, ROWS, BATCHES = 4096, 32, 40


def rate(path: str, packing: str, seed: int) -> float:
  """Returns tokens a second of some batches."""
  corpus = data.load(
    data.Dataset(
      path=path,
      tokenizer="numbers:50258",
      length=LENGTH,
      packing=packing,
      held_out=0.01,
    )
  )
  iterator = data.train_iterator(corpus, batch_size=ROWS, seed=seed)
  next(iterator)
  start = time.perf_counter()
  for _ in range(BATCHES):
    next(iterator)
  seconds = time.perf_counter() - start
  iterator.close()
  return BATCHES * ROWS * LENGTH / seconds


def main():
  """Prints the median of five for each packing."""
  os.sched_setaffinity(0, {0})
  draw = np.random.default_rng(0)
  sizes = draw.integers(50, 2000, 50_000)
  with tempfile.TemporaryDirectory() as folder:
    path = token_files.megatron(
      pathlib.Path(folder) / "x", [draw.integers(0, 50257, n) for n in sizes]
    )
    for packing in ("slices", "packed"):
      rates = [rate(path, packing, seed) for seed in range(5)]
      print(packing, f"{statistics.median(rates) / 1e6:.1f} M tokens/s")


if __name__ == "__main__":
  main()

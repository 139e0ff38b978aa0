"""What the programs of `decode` answer, one line for each line of their input.

generate KIND ROWS PATH    the seconds that a generation took

Its tokens, `[ROWS, slots]`, are then in PATH. KIND is "dual" or "none", the
cache; "alone" is a dual cache with one row after another.
"""

from collections.abc import Callable
import sys
import time

import numpy as np


def serve(generate: Callable[[str, int], np.ndarray]) -> None:
  """Answers until the input ends; `generate` returns finished tokens."""
  for line in sys.stdin:
    _, kind, rows, path = line.split()
    start = time.perf_counter()
    tokens = generate(kind, int(rows))
    seconds = time.perf_counter() - start
    np.save(path, tokens)
    print(seconds, flush=True)

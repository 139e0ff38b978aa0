"""What the three programs answer, one line for each line of their input.

loss     the loss on the given batch, with the given masks
steps N  the seconds that N train steps took
"""

from collections.abc import Callable
import sys
import time


def serve(loss: Callable[[], float], steps: Callable[[int], object]) -> None:
  """Answers until the input ends; `steps` returns when its steps are done."""
  for line in sys.stdin:
    command, *arguments = line.split()
    if command == "loss":
      answer = loss()
    else:
      start = time.perf_counter()
      steps(int(arguments[0]))
      answer = time.perf_counter() - start
    print(answer, flush=True)

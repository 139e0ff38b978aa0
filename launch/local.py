"""Several processes of one job on this machine, started again when one fails.

    python launch/local.py --processes=2 --devices=4 -- \
        train --config=configs/smoke.py --workdir=runs/local

What follows `--` is handed to `dllm` in every process. On a CPU each process
has `--devices` simulated devices, and Gloo carries the collectives; the same
test bed of several hosts that a cluster would be. Process 0 prints; errors of
all go to standard error.

When a process fails, the others are ended and all start again, at most
`--restarts` times; a run continues from its last complete checkpoint. Exit
status 2 says that the command itself is wrong: it is not repeated. SIGTERM and
Ctrl-C are passed on once: a run saves, and ends.
"""

import argparse
from collections.abc import Sequence
import os
import signal
import socket
import subprocess
import sys
import time

_USAGE = 2  # the exit status of a mistake that a restart repeats


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--processes", type=int, default=2)
  parser.add_argument(
    "--devices", type=int, default=4, help="simulated devices a process"
  )
  parser.add_argument("--restarts", type=int, default=3)
  parser.add_argument(
    "--grace",
    type=float,
    default=5.0,
    help="seconds that the others have to end when one failed",
  )
  parser.add_argument("command", nargs="+", help="-- and arguments of dllm")
  return parser.parse_args()


def _free_port() -> int:
  with socket.socket() as found:
    found.bind(("localhost", 0))
    return found.getsockname()[1]


def _start(given: argparse.Namespace) -> list[subprocess.Popen]:
  flags = os.environ.get("XLA_FLAGS", "")
  flags += f" --xla_force_host_platform_device_count={given.devices}"
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": flags.strip(),
    "JAX_COORDINATOR_ADDRESS": f"localhost:{_free_port()}",
    "JAX_NUM_PROCESSES": str(given.processes),
  }
  return [
    subprocess.Popen(
      [sys.executable, "-m", "dllm_jax", *given.command],
      env=environment | {"JAX_PROCESS_ID": str(i)},
      start_new_session=True,  # Ctrl-C is this script's to pass on.
    )
    for i in range(given.processes)
  ]


def _wait(processes: Sequence[subprocess.Popen], grace: float) -> list[int]:
  """Returns the exit statuses, once all are done or one failed."""
  end = None
  while None in (statuses := [p.poll() for p in processes]):
    if end is None and any(statuses):
      end = time.monotonic() + grace
    if end is not None and time.monotonic() > end:
      for process in processes:
        process.kill()
    time.sleep(0.05)
  return statuses


def main() -> int:
  """Runs the job; returns its exit status."""
  given, running, asked = _arguments(), [], []

  def stop(number, frame):
    del frame
    asked.append(number)
    for process in running:
      if process.poll() is None:
        process.send_signal(signal.SIGTERM)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
  for attempt in range(given.restarts + 1):
    running[:] = _start(given)
    pids = " ".join(str(p.pid) for p in running)
    print(f"local: attempt {attempt}, processes {pids}", file=sys.stderr)
    statuses = _wait(running, given.grace)
    if not any(statuses):
      return 0
    print(f"local: exit statuses {statuses}", file=sys.stderr)
    if _USAGE in statuses:
      return _USAGE
    if asked:
      return 1
  print(f"local: gave up after {given.restarts} restarts", file=sys.stderr)
  return 1


if __name__ == "__main__":
  sys.exit(main())

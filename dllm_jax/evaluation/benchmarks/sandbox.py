"""Running generated programs, contained: time, memory, files, processes, network.

A program runs in a process of its own (`sandboxed.py`, which imports nothing of this
package), and its verdict comes back through a pipe. It has passed only if it
reached its end: to exit early, by whatever call, is to fail.

    this process -> cage: namespaces, mounts -> init of them -> the program
       timeout: the whole group is killed; without its init the kernel ends all
       processes of a namespace, whatever they forked or detached

On Linux with user namespaces ("namespaces") all files are read-only but those of
a small file system in memory, which vanishes, and there is no network. Elsewhere
("limits") resource limits and Python's audit hooks refuse writing, processes and
sockets: enough for faulty code, not for hostile code. `Verdict.isolation` says
which it was.
"""

import contextlib
import dataclasses
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time

from dllm_jax.core.paths import Path

_SANDBOXED = Path(__file__).with_name("sandboxed.py")
GRACE_SECONDS = 2.0  # for starting the interpreter and for setting up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What a program may use.

  Attributes:
    seconds: of wall time, and as much processor time.
    memory_mb: address space.
    files_mb: what it may write, in its own directory.
  """

  seconds: float = 10.0
  memory_mb: int = 1024
  files_mb: int = 16

  def __post_init__(self):
    for name in ("seconds", "memory_mb", "files_mb"):
      if getattr(self, name) <= 0:
        raise ValueError(
          f"{name} of a program must be above 0, not {getattr(self, name)}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
  """How a program ended.

  Attributes:
    passed: whether it reached its end without an error.
    reason: "passed", "timeout", "memory", "exited", "killed", or the exception.
    seconds: wall time, the interpreter's start included.
    isolation: "namespaces" or "limits".
  """

  passed: bool
  reason: str
  seconds: float
  isolation: str


@functools.cache
def isolation() -> str:
  """Returns the strongest isolation that this machine grants."""
  if not sys.platform.startswith("linux"):
    return "limits"
  verdict = _run("pass", Limits(seconds=10.0), "namespaces")
  return "namespaces" if verdict.passed else "limits"


def run(program: str, limits: Limits = Limits()) -> Verdict:
  """Returns how a program ended that was run contained."""
  return _run(program, limits, isolation())


def _run(program: str, limits: Limits, kind: str) -> Verdict:
  start = time.monotonic()
  with tempfile.TemporaryDirectory(prefix="program-") as folder:
    task = dataclasses.asdict(limits) | {
      "program": program, "isolation": kind, "folder": folder,
      "nonce": (nonce := secrets.token_hex(16)),
    }  # fmt: skip
    # -I: neither the environment nor the working directory is looked at.
    process = subprocess.Popen(
      [sys.executable, "-I", str(_SANDBOXED)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      cwd=folder,
      env={"PATH": os.defpath, "HOME": folder},
      start_new_session=True,
    )
    try:
      told, _ = process.communicate(
        json.dumps(task).encode(errors="surrogatepass"),
        timeout=limits.seconds + GRACE_SECONDS,
      )
    except subprocess.TimeoutExpired:
      told = None
    finally:
      # Also what the program may have left behind in its group.
      with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
      process.kill()
      process.stdout.close()
      process.wait()
  seconds = time.monotonic() - start
  reason = "timeout" if told is None else _reason(told, nonce)
  return Verdict(
    passed=reason == "passed",
    reason=reason,
    seconds=round(seconds, 3),
    isolation=kind,
  )


def _reason(told: bytes, nonce: str) -> str:
  """Returns what became of a program, by the last line that knows the nonce."""
  try:
    verdict = json.loads(told[told.rindex(b'{"reason"') :])
    return verdict["reason"] if verdict["nonce"] == nonce else "exited"
  except (ValueError, KeyError, TypeError):
    return "exited"

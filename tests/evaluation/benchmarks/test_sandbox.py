"""Generated programs are contained: each misdeed is a failure, in time."""

import contextlib
import dataclasses
import os
import pathlib
import time

import pytest

from dllm_jax.evaluation.benchmarks import sandbox
from dllm_jax.evaluation.benchmarks.sandbox import Limits

LIMITS = Limits(seconds=0.6, memory_mb=256, files_mb=2)
KINDS = sorted({sandbox.isolation(), "limits"})


PATIENT = dataclasses.replace(LIMITS, seconds=20.0)


def ran(program: str, kind: str, limits=PATIENT) -> sandbox.Verdict:
  return sandbox._run(program, limits, kind)


@pytest.fixture(params=KINDS)
def kind(request) -> str:
  return request.param


def test_right_programs_pass(kind):
  end = lambda program: ran(program, kind).reason
  assert end("import math, re\nassert math.gcd(4, 6) == 2") == "passed"
  assert end("x = 1\nassert x == 2").startswith("AssertionError")
  assert end("def f(:").startswith("SyntaxError")


@pytest.mark.parametrize(
  "program",
  [
    "while True: pass",
    "import os, time\nos.setsid()\ntime.sleep(60)",
    "import signal, time\nsignal.alarm(0)\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)",
  ],
)
@pytest.mark.few(1)
def test_what_does_not_end_is_ended(program, kind):
  start = time.monotonic()
  assert ran(program, kind, LIMITS).reason == "timeout"
  assert time.monotonic() - start < LIMITS.seconds + sandbox.GRACE_SECONDS + 2


@pytest.mark.parametrize(
  "program",
  ["x = bytearray(10**10)", "x = []\nwhile 1: x.append(bytearray(10**7))"],
)
def test_memory_is_limited(program, kind):
  assert ran(program, kind).reason == "memory"


def test_files_outside_are_safe(tmp_path, kind):
  kept = tmp_path / "kept"
  kept.write_text("mine")
  tmp_path.chmod(0o777)
  kept.chmod(0o666)
  for program in (
    f"open({str(kept)!r}, 'w').write('x')",
    f"open({str(tmp_path / 'new')!r}, 'w').write('x')",
    f"import os\nos.remove({str(kept)!r})",
    f"import os\nos.rename({str(kept)!r}, {str(tmp_path / 'new')!r})",
    f"import os\nos.open({str(tmp_path / 'new')!r}, os.O_CREAT | os.O_WRONLY)",
  ):
    assert not ran(program, kind).passed
  assert kept.read_text() == "mine" and list(tmp_path.iterdir()) == [kept]


def test_a_disk_cannot_be_filled(kind):
  one = "f = open('a', 'wb')\nwhile True: f.write(bytes(10**5))"
  many = (
    "n = 0\nwhile True:\n  n += 1\n  open(str(n), 'wb').write(bytes(10**5))"
  )
  for program in (one, many):
    assert ran(program, kind).reason.startswith(("OSError", "PermissionError"))


@pytest.mark.parametrize(
  "program",
  [
    "import os\nwhile True: os.fork()",
    "import subprocess; subprocess.run(['sleep', '60'])",
    "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
    "import os; os.kill(os.getppid(), 9)",
  ],
)
def test_processes_and_network_are_refused(program, kind):
  verdict = ran(program, kind)
  assert not verdict.passed and verdict.reason not in ("timeout", "passed")


@pytest.mark.parametrize(
  "program",
  [
    "import sys; sys.exit(0)",
    "import os; os._exit(0)",
    "raise SystemExit",
    "import os\nfor i in range(3, 20):\n  try:\n    os.write(i, "
    'b\'{"reason": "passed", "nonce": ""}\')\n  except OSError: pass\n'
    "os._exit(0)",
  ],
)
def test_leaving_early_is_no_success(program, kind):
  verdict = ran(f"{program}\nassert False", kind)
  assert (verdict.passed, verdict.reason) == (False, "exited")


@pytest.mark.few(1)
def test_nothing_is_left_behind(kind):
  before = cages()
  ran("import time; time.sleep(60)", kind, LIMITS)
  assert cages() <= before


def cages() -> set[str]:
  """Returns the processes that run programs of this test's."""
  found = set()
  for folder in pathlib.Path("/proc").glob("[0-9]*"):
    with contextlib.suppress(OSError):
      arguments = (folder / "cmdline").read_text()
      if "cage.py" in arguments and parent(folder) in (os.getpid(), 1):
        found.add(folder.name)
  return found


def parent(folder: pathlib.Path) -> int:
  return int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])


def test_refuses_senseless_limits():
  with pytest.raises(ValueError, match="seconds"):
    Limits(seconds=0)

"""Checks and measures an accelerator that is at hand for minutes, by one command.

    python launch/device_check.py --minutes=12 --output=h200.json
    python launch/device_check.py --tiny          # the same on any CPU, to try it
    python launch/device_check.py --table=h200.json

Parts run in the order of their worth, each in a process of its own: one that
hangs, fails or runs out of memory ends alone. Each has a time, and what the ones
before it have left over. The file is written after each part, and printed at the
end; what a part had found before it was ended is kept. Ctrl-C and SIGTERM end
the part that runs and keep the rest.

A part is `done`, or `wrong` (a row in which something that must be equal is not),
`failed`, `out of time`, `interrupted` or `not begun`. The exit status is 0 if all
are done, 1 if not, 130 after Ctrl-C and 143 after SIGTERM; 2 for a mistake in
the command.

This file needs Python alone; what is measured is in `device_parts.py`.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping
import contextlib
import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
# Compiled as tests are: a tiny program runs for a moment.
_TINY_FLAGS = (
  "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
)
_KEPT = 2000  # characters of what a part that did not end well had printed


class Part(NamedTuple):
  """Something to measure.

  Attributes:
    name: what it is called.
    seconds: how long it may take, of 12 minutes.
    command: its process, without the file that it appends rows to.
  """

  name: str
  seconds: float
  command: tuple[str, ...]


# Of 12 minutes, start-up and compiling included.
SECONDS = {
  "logits": 80,
  "train_dots": 70,
  "train_none": 70,
  "train_full": 70,
  "train_dots_no_batch": 70,
  "cached": 160,
  "attention": 75,
  "tokens": 65,
  "steps": 60,
}
# A CPU learns nothing from the other policies of what the step keeps.
_NOT_TINY = ("train_none", "train_full", "train_dots_no_batch")


def parts(*, tiny: bool) -> list[Part]:
  """Returns what is measured, in its order."""
  script = (sys.executable, str(HERE / "device_parts.py"))
  return [
    Part(name, seconds, (*script, name, *(["--tiny"] if tiny else [])))
    for name, seconds in SECONDS.items()
    if not (tiny and name in _NOT_TINY)
  ]


class Stopped(Exception):
  """Ctrl-C or SIGTERM; its argument is the signal's number."""


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
  """Turns both signals into `Stopped`."""

  def stop(number, frame):
    del frame
    for each in (signal.SIGINT, signal.SIGTERM):  # One is enough.
      signal.signal(each, signal.SIG_IGN)
    raise Stopped(number)

  before = [
    (each, signal.signal(each, stop))
    for each in (signal.SIGINT, signal.SIGTERM)
  ]
  try:
    yield
  finally:
    for each, handler in before:
      signal.signal(each, handler)


def check(
  chosen: Iterable[Part],
  *,
  seconds: float,
  output: pathlib.Path,
  tiny: bool = False,
) -> tuple[dict[str, Any], int]:
  """Runs parts one after another; returns the report and the exit status.

  Args:
    chosen: the parts.
    seconds: for all of them. Each may use its share of it, and what those
      before it have left over.
    output: where the report is written, after each part.
    tiny: whether sizes are tiny.
  """
  chosen = list(chosen)
  end = time.monotonic() + seconds
  of_all = sum(part.seconds for part in chosen)
  share = lambda some: seconds * sum(part.seconds for part in some) / of_all
  report = {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "tiny": tiny,
    "minutes": seconds / 60,
    "parts": {part.name: {"status": "not begun"} for part in chosen},
  }
  status = 0
  try:
    with _stoppable():
      for i, part in enumerate(chosen):
        limit = end - time.monotonic() - share(chosen[i + 1 :])
        found = report["parts"][part.name] = {"status": "interrupted"}
        try:
          _run(part, limit, _environment(tiny), found, report)
        finally:
          _write(output, report)
          _say(f"{part.name}: {found['status']}, {found.get('seconds', 0)} s")
  except Stopped as stopped:
    status = 128 + stopped.args[0]
  if any(p["status"] != "done" for p in report["parts"].values()):
    status = status or 1
  return report, status


def _run(part, limit, environment, found, report) -> None:
  """Runs a part; fills in what it found, and of what device."""
  start = time.monotonic()
  with tempfile.TemporaryDirectory() as directory:
    rows = pathlib.Path(directory) / "rows.jsonl"
    log = pathlib.Path(directory) / "log"
    with log.open("w") as file:
      process = subprocess.Popen(
        (*part.command, str(rows)),
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=file,
        env=environment,
        start_new_session=True,
      )
    try:
      ended = process.wait(timeout=max(limit, 0))
      found["status"] = "failed" if ended else "done"
    except subprocess.TimeoutExpired:
      found["status"] = "out of time"
    finally:
      _end(process)
      found["seconds"] = round(time.monotonic() - start, 1)
      about, *found["rows"] = _lines(rows) or [{}]
      for name, value in about.items():
        report.setdefault(name, value)
      if found["status"] != "done":
        found["log"] = log.read_text(errors="replace")[-_KEPT:]
      elif any(row.get("ok") is False for row in found["rows"]):
        found["status"] = "wrong"


def _end(process: subprocess.Popen) -> None:
  """Ends a process and what it started."""
  with contextlib.suppress(ProcessLookupError):
    os.killpg(process.pid, signal.SIGKILL)
  process.wait()


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the lines that are whole; the last may have been cut off."""
  text = path.read_text() if path.exists() else ""
  return [json.loads(line) for line in text.split("\n")[:-1]]


def _environment(tiny: bool) -> dict[str, str]:
  """Returns the environment of a part's process."""
  found = dict(os.environ)
  found["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(HERE.parent), found.get("PYTHONPATH")))
  )
  # Tokens are compared with the CPU's.
  platforms = found.get("JAX_PLATFORMS")
  if platforms and "cpu" not in platforms.split(","):
    found["JAX_PLATFORMS"] = f"{platforms},cpu"
  # Each has the device for itself.
  found.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
  if tiny:
    found["XLA_FLAGS"] = f"{_TINY_FLAGS} {found.get('XLA_FLAGS', '')}".strip()
  return found


def _write(path: pathlib.Path, report: Mapping[str, Any]) -> None:
  """Writes a report, whole or not at all."""
  aside = path.with_name(path.name + ".part")
  aside.write_text(json.dumps(report, indent=1) + "\n")
  aside.replace(path)


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def table(report: Mapping[str, Any]) -> str:
  """Returns a report as markdown: what ran where, and a table for each part."""
  device, versions = report.get("device", {}), report.get("versions", {})
  gib = device.get("memory_bytes")
  memory = f", {gib / 2**30:.1f} GiB for programs" if gib else ""
  lines = [
    f"{device.get('count', 0)} x {device.get('name', 'no device')}{memory}; "
    + ", ".join(f"{name} {version}" for name, version in versions.items())
    + f"; {report['date']}{', tiny sizes' if report['tiny'] else ''}."
  ]
  for name, part in report["parts"].items():
    took = f", {part['seconds']} s" if "seconds" in part else ""
    lines += ["", f"### {name}: {part['status']}{took}", ""]
    rows = part.get("rows", [])
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if columns:
      head = [column.replace("_", " ") for column in columns]
      body = [[_cell(row.get(column)) for column in columns] for row in rows]
      lines += _markdown(head, body)
    elif part.get("log"):
      lines.append("    " + part["log"].strip().split("\n")[-1])
    else:
      lines.append("no rows")
  return "\n".join(lines) + "\n"


def _markdown(head: list[str], body: list[list[str]]) -> list[str]:
  """Returns the lines of a table."""
  line = lambda cells: "| " + " | ".join(cells) + " |"
  return [line(head), "|" + "---|" * len(head), *map(line, body)]


def _cell(value: Any) -> str:
  """Returns a figure as text: four digits of fractions, all of whole numbers."""
  if value is None:
    return ""
  if isinstance(value, bool):
    return "yes" if value else "no"
  if isinstance(value, int):
    return f"{value:,}"
  if isinstance(value, float):
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
  return str(value).replace("|", "\\|")


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--minutes", type=float, default=12.0)
  parser.add_argument("--tiny", action="store_true", help="sizes for any CPU")
  parser.add_argument(
    "--output", type=pathlib.Path, default=pathlib.Path("device_check.json")
  )
  parser.add_argument(
    "--parts",
    help=f"some of them, separated by commas; legal: {', '.join(SECONDS)}",
  )
  parser.add_argument(
    "--table", type=pathlib.Path, help="a report to print as markdown instead"
  )
  args = parser.parse_args()
  if not args.minutes > 0:
    parser.error(f"--minutes must be above 0, not {args.minutes}")
  args.parts = args.parts.split(",") if args.parts else list(SECONDS)
  unknown = [name for name in args.parts if name not in SECONDS]
  if unknown:
    parser.error(f"unknown part {unknown[0]!r}; legal: {', '.join(SECONDS)}")
  if args.table:
    try:
      args.table = table(json.loads(args.table.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
      parser.error(f"{args.table} is no report of this command ({error!r})")
  if not args.output.parent.is_dir():
    parser.error(f"{args.output.parent} is no folder; make it first")
  return args


def main() -> int:
  """Runs the command; returns its exit status."""
  args = _arguments()
  if args.table:
    print(args.table, end="")
    return 0
  report, status = check(
    [part for part in parts(tiny=args.tiny) if part.name in args.parts],
    seconds=60 * args.minutes,
    output=args.output,
    tiny=args.tiny,
  )
  print(json.dumps(report, indent=1))
  return status


if __name__ == "__main__":
  sys.exit(main())

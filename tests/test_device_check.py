"""What an accelerator that is at hand for minutes is checked by."""

import functools
import importlib.util
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.runs import ROOT

LAUNCH = ROOT / "launch"


@functools.cache
def script(name):
  spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


ABOUT = {"device": {"name": "toy", "count": 1}, "versions": {"jax": "0"}}


def part(name, *rows, then="", seconds=1.0):
  """Returns a part that writes rows, then does something else in Python."""
  lines = [json.dumps(row) for row in (ABOUT, *rows)]
  code = (
    "import sys, time, os, signal\n"
    f"with open(sys.argv[1], 'a') as f: f.write({chr(10).join(lines)!r} + chr(10))\n"
    f"{then}"
  )
  return script("device_check").Part(
    name, seconds, (sys.executable, "-c", code)
  )


def check(*parts, seconds, tmp_path):
  """Returns the statuses, the report and the exit status of some parts."""
  output = tmp_path / "report.json"
  report, status = script("device_check").check(
    parts, seconds=seconds, output=output
  )
  assert json.loads(output.read_text()) == report
  return [p["status"] for p in report["parts"].values()], report, status


def test_a_part_that_fails_ends_alone(tmp_path):
  statuses, report, status = check(
    part("killed", {"x": 1}, then="os.kill(os.getpid(), signal.SIGKILL)"),
    part("raises", {"x": 2}, then="raise MemoryError('of the device')"),
    part("differs", {"ok": True}, {"ok": False}),
    part("good", {"x": 3}),
    seconds=60,
    tmp_path=tmp_path,
  )
  assert statuses == ["failed", "failed", "wrong", "done"] and status == 1
  assert report["device"] == ABOUT["device"]
  assert [p["rows"][0].get("x") for p in report["parts"].values()] == [
    *(1, 2, None, 3)
  ]
  assert "of the device" in report["parts"]["raises"]["log"]


@pytest.mark.all
def test_a_part_that_takes_too_long_leaves_the_others_their_time(tmp_path):
  # It starts another process, which must not live on.
  child = tmp_path / "child"
  sleeps = (
    "import subprocess\n"
    f"p = subprocess.Popen(['sleep', '60']); open({str(child)!r}, 'w')"
    ".write(str(p.pid))\ntime.sleep(60)"
  )
  start = time.monotonic()
  statuses, report, status = check(
    part("quick", {"x": 0}, seconds=2),
    part("hangs", {"x": 1}, then=sleeps, seconds=1),
    part("after", {"x": 2}, seconds=2),
    seconds=5,
    tmp_path=tmp_path,
  )
  assert statuses == ["done", "out of time", "done"] and status == 1
  assert time.monotonic() - start < 5
  # Its share, 1 s, and what the first one left of 2.
  assert 1 <= report["parts"]["hangs"]["seconds"] <= 3.1
  assert report["parts"]["hangs"]["rows"] == [{"x": 1}]
  with pytest.raises(ProcessLookupError):
    for _ in range(100):  # Until whoever adopts it has reaped it.
      os.kill(int(child.read_text()), 0)
      time.sleep(0.05)


_INTERRUPTED = """
import sys
sys.path.insert(0, {launch!r})
import device_check as d
write = "import sys, time; open(sys.argv[1], 'a').write('{{}}\\\\n{{\\"x\\": 1}}\\\\n')"
d.SECONDS.clear(); d.SECONDS.update(one=1, two=1, three=1)
d.parts = lambda tiny: [
  d.Part("one", 1, (sys.executable, "-c", write)),
  d.Part("two", 1, (sys.executable, "-c", write + "; time.sleep(60)")),
  d.Part("three", 1, (sys.executable, "-c", write)),
]
sys.argv = ["device_check.py", "--output", {output!r}]
sys.exit(d.main())
"""


@pytest.mark.parametrize(
  "number, expected", [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_what_there_is_stays_when_it_is_stopped(tmp_path, number, expected):
  output = tmp_path / "report.json"
  code = _INTERRUPTED.format(launch=str(LAUNCH), output=str(output))
  process = subprocess.Popen(
    [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
  )
  for _ in range(400):  # The first part is done, the second one under way.
    if output.exists():
      break
    time.sleep(0.05)
  time.sleep(0.3)
  process.send_signal(number)
  printed, _ = process.communicate(timeout=20)
  assert process.returncode == expected
  report = json.loads(output.read_text())
  assert json.loads(printed) == report
  statuses = {name: p["status"] for name, p in report["parts"].items()}
  assert statuses == {
    "one": "done",
    "two": "interrupted",
    "three": "not begun",
  }
  assert report["parts"]["one"]["rows"] == [{"x": 1}]


def test_the_parts_and_their_shares():
  check = script("device_check")
  assert sum(check.SECONDS.values()) == 12 * 60
  assert list(check.SECONDS) == list(script("device_parts").PARTS)
  tiny = {each.name for each in check.parts(tiny=True)}
  assert tiny == check.SECONDS.keys() - set(check._NOT_TINY)


def test_table(tmp_path):
  _, report, _ = check(
    part("a", {"x": 0.12345, "n": 123456}, {"why": "a|b", "ok": False}),
    part("b", then="raise ValueError('no device')"),
    seconds=20,
    tmp_path=tmp_path,
  )
  lines = script("device_check").table(report).split("\n")
  assert lines[0].startswith("1 x toy; jax 0; 20")
  at = next(i for i, line in enumerate(lines) if "### a: wrong" in line)
  assert lines[at + 2 : at + 6] == [
    "| x | n | why | ok |",
    "|---|---|---|---|",
    "| 0.1235 | 123,456 |  |  |",
    "|  |  | a\\|b | no |",
  ]
  assert "    ValueError: no device" in lines


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--minutes=0"], "--minutes must be above 0"),
    (["--parts=logits,speed"], "unknown part 'speed'; legal: logits, "),
    (["--output=nowhere/x.json"], "nowhere is no folder"),
    (["--table=nowhere.json"], "nowhere.json"),
  ],
)
def test_mistakes_are_one_line(arguments, message, tmp_path):
  done = subprocess.run(
    [sys.executable, LAUNCH / "device_check.py", *arguments],
    cwd=tmp_path,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert message in done.stderr.strip().split("\n")[-1]


# Each part at tiny size, in this process.


def rows(name):
  return list(script("device_parts").PARTS[name](True))


@pytest.fixture(autouse=True)
def _precision():
  import jax

  with jax.default_matmul_precision(None):
    yield


def test_logits_and_that_wrong_ones_are_noticed(monkeypatch):
  found = rows("logits")
  assert [(row["dtype"], row["ok"]) for row in found] == [
    ("float32", True),
    ("bfloat16", True),
  ]
  parts = script("device_parts")
  off = {"llada_logits": ("input_ids", "logits_off")}
  load = parts.golden_cases.load

  def perturbed(name):
    case = load(name)
    moved = case.arrays["logits"] + np.float32(1e-3)
    return case._replace(arrays=case.arrays | {"logits_off": moved})

  monkeypatch.setattr(parts, "_CASES", off)
  monkeypatch.setattr(parts.golden_cases, "load", perturbed)
  assert [row["ok"] for row in rows("logits")] == [False, True]


@pytest.mark.all
def test_the_train_step():
  (row,) = rows("train_dots")
  assert row["remat"] == "dots" and row["mfu"] is None  # of a CPU
  assert row["tokens_per_second"] > 0 and row["peak_bytes"] > 0


@pytest.mark.all
def test_a_cached_call():
  (row,) = rows("cached")
  step, read = row["cached_step_milliseconds"], row["weight_read_milliseconds"]
  assert math.isclose(row["ratio"], step / read)


@pytest.mark.all
def test_attention(monkeypatch):
  parts = script("device_parts")
  few = parts._masks(1, 128)
  monkeypatch.setattr(
    parts, "_masks", lambda *_: {"padded tail": few["padded tail"]}
  )
  attention = parts.dispatch.attention

  def wrong(*args, implementation, **options):
    out = attention(*args, implementation="xla", **options)
    return out if implementation == "xla" else 1.1 * out

  monkeypatch.setattr(parts.dispatch, "attention", wrong)
  monkeypatch.setattr(parts.dispatch, "IMPLEMENTATIONS", (None, "xla", "off"))
  assert [row["ok"] for row in rows("attention")] == [True, False]

  def refuses(*args, implementation, **options):
    if implementation == "off":
      raise ValueError("not\nhere")
    return wrong(*args, implementation=implementation, **options)

  monkeypatch.setattr(parts.dispatch, "attention", refuses)
  assert rows("attention")[1]["refused"] == "ValueError: not here"


@pytest.mark.all
def test_canvases(monkeypatch):
  parts = script("device_parts")
  run = functools.partial(parts.kept.attention, interpret=True)
  monkeypatch.setattr(parts.kept, "attention", run)
  monkeypatch.setattr(parts.kept, "chosen", lambda name: name == "flash")
  (row,) = parts.canvases(tiny=True)
  assert row["ok"] and row["error"] > 0  # not the reference beside itself
  monkeypatch.setattr(
    parts.kept, "attention", lambda *a, **b: 1.1 * run(*a, **b)
  )
  (row,) = parts.canvases(tiny=True)
  assert not row["ok"]


@pytest.mark.all
def test_tokens_and_that_other_ones_are_noticed(monkeypatch):
  parts = script("device_parts")
  sample, made = parts._sampled, []

  def kept(*args):
    made.append(sample(*args))
    return made[-1]

  monkeypatch.setattr(parts, "_sampled", kept)
  (row,) = rows("tokens")
  assert row["equal"] == row["rows"] and row["ok"]
  # Only where rows differ is there a margin.
  monkeypatch.setattr(parts, "_sampled", lambda *_: made.pop())
  monkeypatch.setattr(parts.ties, "margins", lambda *_: [0.01])
  (row,) = rows("tokens")
  assert row["largest_margin"] == 0.01 and not row["ok"]


@pytest.mark.all
def test_steps():
  (row,) = rows("steps")
  assert row["steps"] == 20 and row["ok"]
  assert row["last_loss"] < row["first_loss"] + 0.5


def test_a_process_writes_what_it_is_of_and_its_rows(tmp_path, monkeypatch):
  parts = script("device_parts")
  monkeypatch.setitem(parts.PARTS, "logits", lambda tiny: iter([{"t": tiny}]))
  path = tmp_path / "rows"
  monkeypatch.setattr(sys, "argv", ["x", "logits", str(path), "--tiny"])
  monkeypatch.setattr(
    parts.compilation, "enable_compilation_cache", lambda: None
  )
  parts.main()
  about, row = map(json.loads, pathlib.Path(path).read_text().splitlines())
  assert about["device"]["name"] == "cpu" and "jax" in about["versions"]
  assert row == {"t": True}


def test_without_an_accelerator_it_says_so(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(sys, "argv", ["x", "logits", str(tmp_path / "rows")])
  with pytest.raises(SystemExit):
    script("device_parts").main()
  assert "jax finds no accelerator here" in capsys.readouterr().err

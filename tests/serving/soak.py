"""A soak: clients that come, cancel and misbehave, and what a server holds of it.

    python -m tests.serving.soak --minutes=10 --clients=50

starts `dllm serve` on a tiny run, in a process of its own on loopback, sends it
a bounded number of requests, and fails unless every answer was the offline one,
no status was 5xx, no slot was lost and memory did not grow.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

_MOST = 100_000  # requests of a client
_GROWTH = 1.03  # of memory, from the second quarter of the time to the last


def prepared(folder: pathlib.Path):
  """Returns a trained run of letters that knows conversations."""
  from tests import runs
  from tests.serving import servers

  file = folder / "tokenizer"
  file.mkdir()
  servers.letters().save(file)
  run = runs.run(
    folder / "run",
    data__tokenizer=str(file / "tokenizer.json"),
    data__length=servers.LENGTH,
  )
  run.train()
  return run


def expected(run) -> list[tuple[dict, str]]:
  """Returns bodies, with the texts that the offline sampler gives for them."""
  from dllm_jax.sampling.options import RowOptions
  from tests.serving import crowd, servers

  bodies = crowd.bodies(4)
  prompts = [run.tokenizer.prompt(body["prompt"]).tolist() for body in bodies]
  rows = run.sample_rows(
    [
      [*ids, *[None] * body["max_tokens"]]
      for ids, body in zip(prompts, bodies, strict=True)
    ],
    length=servers.LENGTH,
    sampler=servers.SAMPLER,
    numbers=[0] * len(bodies),
    options=[RowOptions(seed=body["seed"]) for body in bodies],
  ).rows
  decode = run.tokenizer.decode
  return [
    (body, decode(row[len(ids) :]))
    for body, row, ids in zip(bodies, rows, prompts, strict=True)
  ]


@contextlib.contextmanager
def served(workdir: pathlib.Path, *flags: str):
  """Gives (process, address) of a server that is ready, and ends it."""
  from tests import runs
  from tests.serving import servers

  sampler = servers.SAMPLER
  process = runs.dllm(
    "serve",
    f"--workdir={workdir}",
    f"--name={servers.NAME}",
    "--port=0",
    f"--length={servers.LENGTH}",
    f"--sampler.preset={sampler.preset}",
    f"--sampler.block_length={sampler.block_length}",
    f"--sampler.temperature={sampler.temperature}",
    *flags,
  )
  try:
    said = [process.stdout.readline()]
    while said[-1] and not said[-1].startswith("ready"):
      said.append(process.stdout.readline())  # of the programs that compile
    url = said[0].partition(" at ")[2].partition(",")[0]
    if not said[-1] or not url.startswith("http"):
      process.kill()
      raise AssertionError("".join(said) + process.communicate()[1])
    yield process, url
  finally:
    if process.poll() is None:
      process.kill()
      process.wait()


def memory(process: subprocess.Popen) -> float:
  """Returns what a process holds, MB."""
  status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
  return int(status.split("VmRSS:")[1].split()[0]) / 1024


def counted(url: str) -> dict[str, float]:
  """Returns what a server's metrics say."""
  from tests.serving import servers

  text = servers.send(f"{url}/metrics")[2]
  lines = [line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#"]
  return {name: float(value) for name, value in lines}


def soak(minutes: float, clients: int) -> dict:
  """Returns what came of it; `wrong` is empty if all was as it should be."""
  from tests.serving import crowd as crowds

  with tempfile.TemporaryDirectory() as folder:
    run = prepared(pathlib.Path(folder))
    answers = expected(run)
    flags = ("--slots=8", "--queue=32", "--body_seconds=5")
    with served(run.workdir, *flags) as (process, url):
      crowd = crowds.Crowd(url, answers)
      seconds, began = 60 * minutes, time.monotonic()
      held = []

      def watch():
        while time.monotonic() < began + seconds:
          held.append(memory(process))
          time.sleep(1)

      watching = threading.Thread(target=watch)
      watching.start()
      crowd.all(clients, _MOST, seed=0, until=began + seconds)
      watching.join()
      for _ in range(100):
        after = counted(url)
        if not (after["dllm_slots_running"] or after["dllm_queue_requests"]):
          break
        time.sleep(0.1)
      else:
        crowd.wrong.append("slots are still running: they were lost")
      quiet = crowds.Crowd(url, answers)
      for body in answers:
        quiet._answers = [body]
        quiet.asks(random.Random(0))
      crowd.wrong += quiet.wrong
      process.send_signal(signal.SIGTERM)
      out, errors = process.communicate(timeout=60)
      if process.returncode or "finished" not in out:
        crowd.wrong.append(f"ended with {process.returncode}: {errors[-500:]}")
      if "Traceback" in errors:
        crowd.wrong.append(errors[-2000:])
  quarter = max(len(held) // 4, 1)
  early = statistics.median(held[quarter : 2 * quarter] or held)
  late = statistics.median(held[-quarter:])
  if late > _GROWTH * early:
    crowd.wrong.append(f"memory grew from {early:.0f} to {late:.0f} MB")
  bad = {s: n for s, n in crowd.statuses.items() if s >= 500}
  told = {n: c for n, c in after.items() if 'status="5' in n and c}
  if bad or told:
    crowd.wrong.append(f"5xx: {bad} {told}")
  return {
    "minutes": minutes,
    "clients": clients,
    "answers_as_offline": crowd.served,
    "statuses": crowd.statuses,
    "rows": {
      name.partition('"')[2].rstrip('"}'): int(count)
      for name, count in after.items()
      if name.startswith("dllm_rows_total")
    },
    "memory_mb": [round(early), round(late)],
    "wrong": crowd.wrong[:20],
  }


def main() -> int:
  """Runs a soak as the command line has it; returns the exit status."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--minutes", type=float, default=10.0)
  parser.add_argument("--clients", type=int, default=50)
  given = parser.parse_args()
  result = soak(given.minutes, given.clients)
  print(json.dumps(result, indent=2))
  return int(bool(result["wrong"]))


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ.setdefault("XLA_FLAGS", "")
  sys.exit(main())

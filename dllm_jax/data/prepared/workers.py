"""Processes that tokenise, one piece after another.

Not multiprocessing: its children run the caller's main module first, and with
it jax; and they outlive a caller that is killed. These read what to do from
standard input, a line of JSON at a time, and end at once when that does.
"""

from collections.abc import Callable, Iterable
import concurrent.futures
import contextlib
import errno
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any

from dllm_jax.core import paths
from dllm_jax.data.prepared import piece as pieces
from dllm_jax.data.prepared import progress as progress_lib
from dllm_jax.data.prepared.encoder import Encoder
from dllm_jax.data.prepared.progress import Progress
from dllm_jax.data.tokenizer import tokenizer_from_json

Job = dict[str, Any]
"""`{"hash": piece}`, or `{"tokenise": piece, "repeated": numbers}`."""

_MISTAKES = {
  "ValueError": ValueError,
  "ImportError": ImportError,
  "FileNotFoundError": FileNotFoundError,
}


def processors() -> int:
  """Returns how many processors this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


class Workers:
  """Does jobs in processes, or here if one is enough.

  Args:
    progress: what is worked on.
    count: how many processes.
  """

  def __init__(self, progress: Progress, count: int):
    self._progress, self._count = progress, count
    self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
    self._stack = contextlib.ExitStack()
    self._started = 0
    self._lock = threading.Lock()

  def __enter__(self) -> "Workers":
    return self

  def __exit__(self, *error) -> None:
    self._stack.close()

  def run(self, jobs: Iterable[Job], done: Callable[[], Any]) -> None:
    """Does jobs, in any order.

    Args:
      jobs: what is to be done.
      done: called after each.

    Raises:
      ValueError: bad input.
      OSError: a full disk, a file that has gone.
    """
    jobs = list(jobs)
    here = self._count == 1 or len(jobs) == 1 and not self._started
    act = self._here if here else self._apart
    with concurrent.futures.ThreadPoolExecutor(
      1 if here else self._count
    ) as pool:
      try:
        for future in concurrent.futures.as_completed([
          pool.submit(act, job) for job in jobs
        ]):
          future.result()
          done()
      except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        self._stack.close()  # so that nobody waits for those at work
        raise

  @functools.cached_property
  def _encoder(self) -> Encoder:
    return _encoder(self._progress)

  def _here(self, job: Job) -> None:
    act(self._progress, self._encoder, job)

  def _apart(self, job: Job) -> None:
    try:
      process = self._idle.get_nowait()
    except queue.Empty:
      with self._lock:
        process = self._stack.enter_context(_Process(self._progress))
        self._started += 1
    process.do(job)
    self._idle.put(process)


class _Process:
  """A process of `main`."""

  def __init__(self, progress: Progress):
    root = str(paths.Path(__file__).parents[3])
    given = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([root, *filter(None, [given])])
    # One thread of the tokenizers' own: they are quicker in it than in ours.
    threads = {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "1"}
    self._errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
    self._process = subprocess.Popen(
      [
        *(sys.executable, "-m", __name__),
        *(str(progress.folder), progress.plan.fingerprint),
      ],
      env=os.environ | {"PYTHONPATH": path} | threads,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      text=True,
    )

  def __enter__(self) -> "_Process":
    return self

  def __exit__(self, *error) -> None:
    self._process.kill()
    self._process.wait()
    self._process.stdout.close()
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    self._errors.close()

  def do(self, job: Job) -> None:
    """Has a job done."""
    answer = ""
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.write(json.dumps(job) + "\n")
      self._process.stdin.flush()
      answer = self._process.stdout.readline()
    if not answer:
      status = self._process.wait()
      self._errors.seek(0)
      said = self._errors.read().strip()[-1000:]
      raise RuntimeError(f"a process ended with status {status}: {said}")
    error = json.loads(answer)
    if not error:
      return
    if error["kind"] in _MISTAKES:
      raise _MISTAKES[error["kind"]](error["text"])
    if error["errno"]:
      raise OSError(error["errno"], error["text"])
    raise RuntimeError(f"{error['kind']}: {error['text']}")


def _encoder(progress: Progress) -> Encoder:
  return Encoder(tokenizer_from_json(progress.plan.tokenizer))


def act(progress: Progress, encoder: Encoder, job: Job) -> None:
  """Does a job in this process."""
  if "hash" in job:
    if job["hash"] not in progress.hashed():  # by another share, meanwhile
      pieces.hash_documents(progress, job["hash"])
    return
  pieces.tokenise(progress, encoder, job["tokenise"], job["repeated"])


def main(folder: str, fingerprint: str) -> None:
  """Does the jobs that come on standard input, until it ends."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)  # What libraries print is no answer.
  jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
  threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
  place = paths.place(folder)
  progress = encoder = None
  while True:
    job = json.loads(jobs.get())
    answer: dict[str, Any] = {}
    try:
      if progress is None:
        plan = progress_lib.read_plan(place)
        if plan is None or plan.fingerprint != fingerprint:
          raise ValueError(
            f"{folder} is being filled by another dllm prepare with other "
            "settings; give each an output of its own"
          )
        progress = Progress(place, plan)
        encoder = _encoder(progress)
      act(progress, encoder, job)
    except Exception as error:
      answer = _described(error)
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _described(error: Exception) -> dict[str, Any]:
  kind = next((n for n, k in _MISTAKES.items() if isinstance(error, k)), None)
  number = getattr(error, "errno", None)
  full = number == errno.ENOSPC
  return {
    "kind": kind or type(error).__name__,
    "text": error.strerror if full else str(error),
    "errno": number,
  }


def _listen(jobs: queue.SimpleQueue) -> None:
  for line in sys.stdin:
    jobs.put(line)
  os._exit(0)  # Nobody is there who waits for what is being made.


if __name__ == "__main__":
  main(*sys.argv[1:])

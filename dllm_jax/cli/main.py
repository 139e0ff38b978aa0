"""`dllm`: the console command. Dispatch, exit status and the last line of JSON.

Exit status 0 on success, 2 for a mistake of the caller's (one line that says what
was wrong), 1 otherwise. Text for people goes to standard output as it comes,
warnings and bars to standard error, and the last line of standard output is one
JSON object.
"""

# Pythons that are too old for the rest load this file, to say so.
from __future__ import annotations

from collections.abc import Sequence
import gc
import importlib
import json
import logging
import os
import sys
import traceback
import warnings

# What a command needs is imported when it is called: `dllm --help` loads
# neither jax nor numpy, nor what reads the versions of packages.
_COMMANDS = {
  "train": "train a configuration, or resume what is in --workdir",
  "align": "train a copy of a run on preferences",
  "sample": "sample text from a trained model",
  "decide": "answer questions about a text by labels, in one network call",
  "serve": "answer requests over HTTP, by OpenAI's conventions",
  "chat": "talk to a model that has a chat template",
  "evaluate": "evaluate a trained model: likelihood, samples and other tasks",
  "report": "write one HTML page that compares runs",
  "harness": "run lm-evaluation-harness with the model dllm_jax",
  "compare": "train several configurations at one budget and compare them",
  "scaling": "train a grid of sizes at budgets of FLOPs, and fit its laws",
  "reinforce": "train a copy of a run on its own answers, by rewards",
  "distil": "train a copy of a run that needs fewer network calls",
  "convert": "import published weights, or export a run to their layout",
  "prepare": "tokenise a corpus once into ArrayRecord files",
  "plan": "tell what a configuration costs on a machine that is not here",
  "benchmark": "measure the train step or the sampler",
  "configs": "list the bundled configurations",
}


_INTERRUPTED = 130  # as shells have it

# Commands that lie in a folder of `commands`.
_FOLDERS = {
  **dict.fromkeys(("align", "distil", "reinforce"), "posttraining."),
  **dict.fromkeys(("benchmark", "compare", "report", "scaling"), "reports."),
}


def _usage() -> str:
  lines = [
    "dllm trains, evaluates and samples diffusion language models.",
    "",
    "usage: dllm COMMAND [--flag=value ...]",
    "",
    "commands:",
  ]
  lines += [f"  {name:<10} {text}" for name, text in _COMMANDS.items()]
  lines += [
    "",
    "`dllm COMMAND --help` lists a command's flags. To begin:",
    "  dllm train --config=shakespeare --workdir=runs/shakespeare",
    "  dllm sample --workdir=runs/shakespeare --prompt='ROMEO:'",
  ]
  return "\n".join(lines)


def _callers_mistake(error: BaseException) -> bool:
  """Whether an error was raised by this package, about what it was given.

  A ValueError from inside a library is no statement about the command line: it is
  a defect, and its traceback is wanted.
  """
  kinds = (ValueError, KeyError, TypeError, OSError, ImportError)
  if not isinstance(error, kinds):
    return False
  if isinstance(
    error, (FileNotFoundError, NotADirectoryError, PermissionError)
  ):
    return True
  from dllm_jax.core.paths import Path  # pylint: disable=g-import-not-at-top

  package = Path(__file__).parent.parent
  frames = traceback.extract_tb(error.__traceback__)
  return bool(frames) and package in Path(frames[-1].filename).parents


def _disk_is_full(error: BaseException) -> bool:
  text = str(error)
  return any(
    words in text
    for words in ("No space left on device", "ENOSPC", "quota exceeded")
  )


def _memory_is_full(error: BaseException) -> bool:
  text = str(error)
  return "RESOURCE_EXHAUSTED" in text or "Out of memory" in text


def _message(error: BaseException) -> str:
  text = error.args[0] if isinstance(error, KeyError) and error.args else error
  return " ".join(str(text).split())


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command and returns the exit status.

  Args:
    argv: the arguments after the program's name; by default the process's.
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  if not argv or argv[0] in ("--help", "-h", "help", "--helpfull"):
    print(_usage())
    return 0 if argv else 2
  name = argv.pop(0)
  if name not in (*_COMMANDS, "--version"):
    from dllm_jax.core import check  # pylint: disable=g-import-not-at-top

    hint = check.close(name, _COMMANDS)
    legal = ", ".join(_COMMANDS)
    return _fail(f"unknown command {name!r}; {hint}legal: {legal}", 2)
  from dllm_jax.cli import installed  # pylint: disable=g-import-not-at-top

  if name == "--version":
    print(installed.version("dllm_jax"))
    return 0
  if (problem := installed.problem(name)) is not None:
    return _fail(problem, 2)
  installed.prevent_wrong_products()
  try:
    return _run(name, argv)
  except KeyboardInterrupt:
    return _fail("interrupted", _INTERRUPTED)
  except BrokenPipeError:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except Exception as error:  # pylint: disable=broad-except
    if os.environ.get("DLLM_TRACEBACK"):
      traceback.print_exc()
    if _disk_is_full(error):
      return _fail(
        "the disk is full; free some space and run the same command again: it "
        "continues from the last complete checkpoint",
        1,
      )
    if _memory_is_full(error):
      return _fail(
        "a device's memory is too small for this: fewer rows at once (training."
        "microbatches, --slots) or shorter ones (data.length, --length); dllm "
        f"plan says beforehand what fits ({_message(error)[:200]})",
        1,
      )
    if _callers_mistake(error):
      return _fail(_message(error), 2)
    lost = type(error).__name__ == "JaxRuntimeError" or "Gloo" in str(error)
    if lost and _of_several():
      return _fail(
        "this process has lost another one, or its devices: start all again, "
        "they continue from the last complete checkpoint "
        f"({_message(error)[:300]})",
        1,
      )
    if type(error).__name__ in ("NonFiniteLossError", "LostDataError"):
      return _fail(_message(error), 1)
    traceback.print_exc()
    return _fail(f"{type(error).__name__}: {_message(error)[:300]}", 1)


def _run(name: str, argv: list[str]) -> int:
  # Imports and tracing make objects by the million, and next to no cycles.
  gc.set_threshold(400_000, 50, 100)
  # Writers' threads log tracebacks of errors that reach us, and our one line, too.
  for library in ("absl", "gcsfs"):
    logging.getLogger(library).setLevel(logging.CRITICAL)
  warnings.formatwarning = lambda text, *_: f"dllm: warning: {text}\n"
  from dllm_jax.cli import command as commands  # pylint: disable=g-import-not-at-top

  module = importlib.import_module(
    f"dllm_jax.cli.commands.{_FOLDERS.get(name, '')}{name}"
  )
  if "--help" in argv or "-h" in argv:
    variant = module.COMMAND.variant
    print(commands.help_text(variant(argv) if variant else module.COMMAND))
    return 0
  result = module.COMMAND.run(argv)
  sys.stdout.flush()
  print(json.dumps(result), flush=True)
  # A launcher that starts what failed again is told of a run that was stopped.
  stopped = os.environ.get("DLLM_INTERRUPTED_STATUS", "0")
  return int(stopped) if result.get("interrupted") else 0


def _fail(message: str, status: int) -> int:
  sys.stdout.flush()
  print(f"dllm: {message}", file=sys.stderr, flush=True)
  return status


def _of_several() -> bool:
  """Whether this process is one of a job's; starts nothing."""
  distributed = sys.modules.get("dllm_jax.parallel.distributed")
  return distributed is not None and distributed.store() is not None


def console() -> None:
  """The entry point of the console script."""
  status = main()
  sys.stderr.flush()
  # An ordinary exit waits for the other processes, which wait for this one, and
  # for what is still computed, or takes its arrays away under it.
  if status == _INTERRUPTED or (status and _of_several()):
    workers = sys.modules.get("multiprocessing")
    for one in workers.active_children() if workers else ():
      one.terminate()
    os._exit(status)
  gc.freeze()  # To leave, the interpreter would look through all objects, 0.3 s.
  sys.exit(status)

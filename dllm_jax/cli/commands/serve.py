"""`dllm serve`: answers requests over HTTP, by OpenAI's conventions."""

from collections.abc import Mapping
import os
from typing import Any

from absl import flags

from dllm_jax.cli import command as commands
from dllm_jax.core import paths

_KEY = "DLLM_API_KEY"
_STATES = 1024  # of a language
_HERE = ("127.0.0.1", "localhost", "::1")


def _define(flag: commands.Flags) -> None:
  flag.path("workdir", None, "the run to serve")
  flag.string("host", "127.0.0.1", "address to listen at; 0.0.0.0 for all")
  flag.integer("port", 8000, "0 for any that is free", lower_bound=0)
  flag.integer("slots", 8, "rows that run at once", lower_bound=1)
  flag.integer("queue", 64, "rows that may wait; more get 429", lower_bound=0)
  flag.integer(
    "length",
    0,
    "tokens of a row, prompt and answer; 0 for the training length",
    lower_bound=0,
  )
  flag.integer(
    "calls",
    1,
    "network calls between two looks at what came of them, at most",
    lower_bound=1,
  )
  flag.integer(
    "top_logprobs",
    0,
    "best tokens that requests may ask for beside each, with their "
    "log-probabilities; they are found for every token",
    lower_bound=0,
  )
  flag.integer(
    "languages",
    -1,
    "states of the largest language that an answer may be held to, a JSON schema "
    "or an expression; 0 for none, -1 for 1024 where the sampler can",
    lower_bound=-1,
  )
  flag.string("name", "", "what requests call the model; the run's by default")
  flag.string(
    "api_key",
    "",
    "what clients must send as `Authorization: Bearer KEY`; other processes of "
    f"this machine can read it here: prefer --api_key_file, or {_KEY} in the "
    "environment",
  )
  flag.path("api_key_file", "", "a file whose first line is the key")
  flag.use_ema()
  _define_limits(flag)


def _define_limits(flag: commands.Flags) -> None:
  flag.integer("max_body", 2**20, "bytes of a request", lower_bound=1)
  flag.integer(
    "max_choices",
    0,
    "answers to one request, prompts times n; 0 for as many as there are slots",
    lower_bound=0,
  )
  flag.integer(
    "max_concurrent", 256, "requests at once; more get 429", lower_bound=1
  )
  flag.float(
    "max_seconds",
    600.0,
    "seconds of an answer, its reader's too",
    lower_bound=0,
  )
  flag.float(
    "body_seconds", 30.0, "seconds in which a body must arrive", lower_bound=0
  )
  flag.float(
    "drain_seconds",
    30.0,
    "seconds that answers have to end in, after SIGTERM or Ctrl-C",
    lower_bound=0,
  )


def _run(argv: list[str]) -> Mapping[str, Any]:
  values = commands.parse(COMMAND, argv)
  workdir = commands.required(values, "workdir", "runs/mine")
  key = _key(values)
  _check_installed()

  commands.join()
  from dllm_jax import serving  # pylint: disable=g-import-not-at-top
  from dllm_jax.run.run import Run  # pylint: disable=g-import-not-at-top

  limits = serving.Limits(
    body_bytes=values.max_body,
    body_seconds=values.body_seconds,
    choices=values.max_choices or values.slots,
    concurrent=values.max_concurrent,
    seconds=values.max_seconds,
    drain_seconds=values.drain_seconds,
  )
  languages = values.languages
  run = Run.open(workdir, mesh=values["mesh"].value.to_dict())
  sampler = commands.sampler(values, argv, run.config.sampler)
  if languages < 0:
    languages = _STATES if _follows(run, sampler) else 0
  engine = serving.Engine.of(
    run,
    sampler=sampler,
    slots=values.slots,
    length=values.length or None,
    queue=values.queue,
    calls=values.calls,
    top=values.top_logprobs,
    use_ema=values.use_ema,
    languages=languages,
  )
  if values.host not in _HERE and key is None:
    print(
      f"dllm: warning: everyone who reaches {values.host} may use the model: "
      "give --api_key_file",
      flush=True,
    )
  model = serving.Model.of(
    run,
    engine,
    name=values.name or paths.place(workdir).name,
    sampler=sampler,
    limits=limits,
    use_ema=values.use_ema,
  )
  return serving.serve(model, host=values.host, port=values.port, key=key)


def _follows(run: Any, sampler: Any) -> bool:
  """Whether answers can be held to a language, and what that needs is there."""
  import importlib.util  # pylint: disable=g-import-not-at-top

  if importlib.util.find_spec("outlines_core") is None:
    return False
  ends, length = run.tokenizer.end_ids, run.config.data.length
  try:
    sampler.build(run.objective, length=length, end_ids=ends).check_languages()
  except ValueError:
    return False
  return True


def _key(values: flags.FlagValues) -> str | None:
  """Returns the key that clients must know, or None."""
  given = {
    "--api_key": values.api_key,
    "--api_key_file": values.api_key_file,
    _KEY: os.environ.get(_KEY, ""),
  }
  named = [name for name, value in given.items() if value]
  if len(named) > 1:
    raise commands.UsageError(
      f"{named[0]} and {named[1]} give a key: leave one"
    )
  if not named:
    return None
  key = given[named[0]]
  if named[0] == "--api_key_file":
    text = paths.place(key).read_text(encoding="utf-8")
    key = text.partition("\n")[0].strip()
  if not key or not key.isascii() or not key.isprintable():
    raise commands.UsageError(
      f"{named[0]} must hold a key of printable ASCII characters"
    )
  return key


def _check_installed() -> None:
  import importlib.util  # pylint: disable=g-import-not-at-top

  missing = [
    name
    for name in ("fastapi", "uvicorn", "prometheus_client")
    if importlib.util.find_spec(name) is None
  ]
  if missing:
    raise commands.UsageError(
      f"dllm serve needs {missing[0]}: pip install 'dllm_jax[serve]'"
    )


def _mesh() -> Any:
  from dllm_jax.parallel.mesh import MeshConfig  # pylint: disable=g-import-not-at-top

  return MeshConfig()


COMMAND = commands.Command(
  name="serve",
  summary="Answers requests over HTTP, by OpenAI's conventions: see "
  "docs/serving.md.",
  define=_define,
  run=_run,
  overrides=("sampler",),
  sections={"mesh": _mesh},
)

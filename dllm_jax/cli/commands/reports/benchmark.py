"""`dllm benchmark train` / `sample` / `serve` / `loss`: compilation apart."""

from collections.abc import Mapping
import tempfile
from typing import Any

from absl import flags

from dllm_jax.cli import command as commands
from dllm_jax.core.paths import Path


def _define(flag: commands.Flags) -> None:
  flag.integer("rounds", 5, "rounds of which the median counts", lower_bound=1)
  flag.integer("steps", 20, "train steps in a round", lower_bound=2)
  flag.multi_integer(
    "batch_size",
    [8],
    "rows that are sampled together; repeated, one line of a table for each",
    lower_bound=1,
  )
  flag.integer(
    "prompt_tokens",
    None,
    "random tokens before what is sampled; by default a third of the canvas",
    lower_bound=0,
  )
  flag.bool("ragged", False, "sample after prompts of different lengths")
  flag.enum(
    "against",
    None,
    ["uncached", "equal", "weights"],
    "what runs in alternation, for a ratio: the same without a cache, rows of "
    "equal length beside ragged ones, or one reading of all weights beside a "
    "cached network call",
  )
  for name, default, text in (
    ("vocab", 126_464, "tokens of the loss"),
    ("length", 4096, "positions of the loss"),
    ("width", 512, "features of a position of the loss"),
  ):
    flag.integer(name, default, text, lower_bound=2)


def _run(argv: list[str]) -> Mapping[str, Any]:
  if not argv or argv[0] not in COMMAND.positional:
    raise commands.UsageError(
      "say what to measure: dllm benchmark train --config=..., "
      "dllm benchmark sample --config=..., dllm benchmark serve --config=... "
      "or dllm benchmark loss"
    )
  what, *rest = argv
  values = commands.parse(COMMAND, rest)
  if what == "loss":
    return _loss(values)
  resolved = commands.required(values, "config", "shakespeare")

  from dllm_jax.reports import benchmark  # pylint: disable=g-import-not-at-top
  from dllm_jax.run.run import Run  # pylint: disable=g-import-not-at-top

  if what == "train":
    result = benchmark.train(resolved, steps=values.steps, rounds=values.rounds)
    print(
      f"{result['tokens_per_second']:,.0f} tokens/s, "
      f"{result['step_milliseconds']:.1f} ms a step, of which "
      f"{100 * result['outside_step']:.1f} % outside the compiled step"
    )
    return result
  with tempfile.TemporaryDirectory() as directory:
    run = Run.create(resolved, Path(directory) / "run")
    run.start()
    if what == "serve":
      return _serve(run, values, rest)
    results = [
      benchmark.sample(
        run,
        commands.sampler(values, rest, run.config.sampler),
        batch_size=size,
        rounds=values.rounds,
        prompt_tokens=values.prompt_tokens,
        ragged=values.ragged,
        against=values.against,
      )
      for size in values.batch_size
    ]
  for result in results:
    print(_line(result))
  return results[0] if len(results) == 1 else {"rows": results}


def _serve(run, values: flags.FlagValues, rest: list[str]) -> Mapping[str, Any]:
  from dllm_jax.reports import benchmark_serve  # pylint: disable=g-import-not-at-top

  sampler = commands.sampler(values, rest, run.config.sampler)
  results = benchmark_serve.serve(
    run,
    sampler,
    slots=values.batch_size[0],
    rounds=values.rounds,
    prompt_tokens=values.prompt_tokens,
  )
  print(benchmark_serve.table(results))
  return results


def _line(result: Mapping[str, Any]) -> str:
  """Returns a measurement for people."""
  line = (
    f"batch {result['batch_size']}: {result['tokens_per_second']:,.1f} "
    f"tokens/s, {result['step_milliseconds']:.1f} ms a network call"
  )
  names = {
    "uncached": "times the tokens/s without a cache",
    "equal": "times the tokens/s of rows of equal length",
    "weights": "times as long as reading all weights once",
  }
  if "against" not in result:
    return line
  return f"{line}, {result['ratio']:.2f} {names[result['against']]}"


def _loss(values: flags.FlagValues) -> Mapping[str, Any]:
  from dllm_jax.reports import benchmark_loss  # pylint: disable=g-import-not-at-top

  result = benchmark_loss.loss(
    vocab=values.vocab,
    length=values.length,
    width=values.width,
    rounds=values.rounds,
  )
  print(
    f"of the dense computation's time: {result['supervised_time']:.2f} with "
    f"every position supervised, {result['masked_time']:.2f} with half of "
    f"them, {result['reduce_time']:.2f} by the generic reduction; "
    f"{result['memory']:.3f} of its memory"
  )
  return result


COMMAND = commands.Command(
  name="benchmark",
  summary="Measures the train step, the sampler, the engine, or the loss.",
  define=_define,
  run=_run,
  overrides=("config", "sampler"),
  positional=("train", "sample", "serve", "loss"),
)

"""`dllm sample`: samples text from a trained model."""

from collections.abc import Mapping
import dataclasses
import json
from typing import Any

from dllm_jax.cli import command as commands
from dllm_jax.cli import pictures
from dllm_jax.core import paths


def _define(flag: commands.Flags) -> None:
  flag.path("workdir", None, "the run to sample")
  flag.multi_string("prompt", [], "text to continue")
  flag.path(
    "prompts",
    "",
    "a file with a prompt on each line, which are sampled in one batch; a .jsonl "
    'has objects such as {"prompt": "ROMEO:", "temperature": 0.7, "seed": 3}',
  )
  flag.multi_string(
    "infill",
    [],
    "text with spans to fill in, such as 'To be [MASK*8] not'",
  )
  flag.integer("num_samples", 1, "samples of each prompt", lower_bound=1)
  flag.integer("seed", 0, "seed of the samples")
  flag.integer(
    "length", 0, "slots of the canvas; 0 for the training length", lower_bound=0
  )
  flag.integer(
    "new_tokens",
    0,
    "tokens after each prompt, on a canvas for the longest of them; 0 fills the "
    "canvas",
    lower_bound=0,
  )
  flag.use_ema()
  flag.path(
    "trace",
    "",
    "write the unmasking to this file: .html plays it, .svg and .png are "
    "strips, .gif an animation",
  )
  flag.path(
    "image",
    "",
    "draw pictures of the prompts, by a model with image tokens, into this file; "
    "several are one sheet",
  )
  flag.multi_string(
    "input_image", [], "a picture that --prompt asks about; may be repeated"
  )
  flag.bool("watch", False, "play the first sample in the terminal")


def _run(argv: list[str]) -> Mapping[str, Any]:
  values = commands.parse(COMMAND, argv)
  workdir = commands.required(values, "workdir", "runs/mine")
  rows = [{"prompt": text} for text in values.prompt]
  rows += _rows(values.prompts)
  prompts = [row.pop("prompt") for row in rows]
  if prompts and values.infill:
    raise commands.UsageError("give --prompt or --infill, not both")
  if values.image or values.input_image:
    return pictures.sample(values, argv, prompts)

  commands.join()
  from dllm_jax.run.run import Run  # pylint: disable=g-import-not-at-top
  from dllm_jax.sampling.traces import terminal, write  # pylint: disable=g-import-not-at-top

  if values.trace:
    write.check(values.trace)
  options = [_options(row) for row in rows] if any(rows) else None

  run = Run.open(workdir)
  sampled = run.sample(
    prompts or [""],
    infills=values.infill,
    num_samples=values.num_samples,
    length=values.length or None,
    new_tokens=values.new_tokens or None,
    seed=values.seed,
    sampler=commands.sampler(values, argv, run.config.sampler),
    options=options,
    use_ema=values.use_ema,
    trace=bool(values.trace) or values.watch,
  )
  if values.watch:
    terminal.play(sampled.generation.trace, run.tokenizer.decode)
  for i, text in enumerate(sampled.texts):
    print(f"--- sample {i}\n{text}", flush=True)
  if values.trace:
    write.trace(values.trace, sampled.generation.trace, run.tokenizer.decode)
    print(f"wrote {values.trace}")
  return {
    "samples": sampled.texts,
    "function_evaluations": max(
      sampled.generation.function_evaluations.tolist()
    ),
    "tokens_per_second": sampled.new_tokens / sampled.seconds,
    "compile_seconds": sampled.compile_seconds,
  }


def _rows(path: str) -> list[dict[str, Any]]:
  """Returns the prompts of a file with what each chooses; none without a file."""
  if not path:
    return []
  if not paths.place(path).is_file():
    raise commands.UsageError(
      f"--prompts={path} is no file: write a prompt on each line of one"
    )
  lines = paths.place(path).read_text(encoding="utf-8").splitlines()
  lines = [line for line in lines if line.strip()]
  if not lines:
    raise commands.UsageError(f"{path} holds no prompt: write one on each line")
  if paths.place(path).suffix != ".jsonl":
    return [{"prompt": line} for line in lines]
  return [
    _object(line, f"line {i + 1} of {path}") for i, line in enumerate(lines)
  ]


def _object(line: str, where: str) -> dict[str, Any]:
  try:
    row = json.loads(line)
  except ValueError:
    row = None
  if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
    raise commands.UsageError(
      f'{where} is no object with a prompt, such as {{"prompt": "ROMEO:", '
      '"temperature": 0.7}'
    )
  return row


def _options(row: Mapping[str, Any]):
  """Returns what one prompt chooses."""
  from dllm_jax.sampling.options import RowOptions  # pylint: disable=g-import-not-at-top

  legal = [field.name for field in dataclasses.fields(RowOptions)]
  for name in row:
    if name not in legal:
      raise commands.UsageError(
        f"a prompt has no option {name!r}; legal: {', '.join(legal)}"
      )
  biases = row.get("logit_bias", {})
  if not isinstance(biases, dict) or not all(map(str.isdecimal, biases)):
    raise commands.UsageError(
      f'logit_bias is an object such as {{"5": 2.0}}, by token id, not {biases}'
    )
  biases = {int(token): value for token, value in biases.items()}
  return RowOptions(**row | ({"logit_bias": biases} if biases else {}))


COMMAND = commands.Command(
  name="sample",
  summary="Samples text from a trained model.",
  define=_define,
  run=_run,
  overrides=("sampler",),
)

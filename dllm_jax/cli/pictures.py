"""`dllm sample --image` and `--input_image`: pictures drawn, and asked about."""

from collections.abc import Mapping, Sequence
from typing import Any

from dllm_jax.cli import command as commands
from dllm_jax.core import paths


def sample(
  values: Any, argv: Sequence[str], prompts: Sequence[str]
) -> Mapping[str, Any]:
  """Draws pictures, or answers questions about some; returns the last line's.

  Args:
    values: the flags of `dllm sample`.
    argv: its arguments.
    prompts: what to draw, or one question.

  Raises:
    UsageError: flags do not go together.
  """
  workdir = commands.required(values, "workdir", "runs/mine")
  if values.image and values.input_image:
    raise commands.UsageError(
      "give --image to draw or --input_image to ask, not both"
    )
  if values.infill or not prompts:
    raise commands.UsageError(
      "pictures need --prompt: what to draw, or what to ask, for example"
      " --prompt='a seven'"
    )
  if values.image and paths.place(values.image).suffix.lower() != ".png":
    raise commands.UsageError(
      f"--image must be a .png, not {values.image!r}: name it out.png"
    )
  commands.join()
  from dllm_jax.run import images  # noqa: PLC0415
  from dllm_jax.run.run import Run  # noqa: PLC0415

  run = Run.open(workdir)
  usual = images.chosen(run, None, draws=bool(values.image))
  sampler = commands.sampler(values, argv, usual)
  make = _drawn if values.image else _answered
  return make(run, values, sampler, prompts)


def _drawn(run, values, sampler, prompts) -> Mapping[str, Any]:
  from dllm_jax.data.images.pictures import png  # noqa: PLC0415
  from dllm_jax.run import images  # noqa: PLC0415
  from dllm_jax.sampling.traces import tiles  # noqa: PLC0415

  drawn = images.draw(
    run,
    prompts,
    num_samples=values.num_samples,
    seed=values.seed,
    sampler=sampler,
    use_ema=values.use_ema,
    trace=bool(values.trace),
  )
  pictures = list(drawn.pictures)
  whole = pictures[0] if len(pictures) == 1 else tiles.sheet(pictures)
  paths.place(values.image).write_bytes(png(whole))
  print(f"wrote {values.image}")
  if values.trace:
    build = images.sequences(run)
    shown = tiles.frames(
      drawn.sampled.generation.trace,
      images.tokenizer_of(run).decode,
      start=images.slots(build).start,
      tokens=build.vocabulary.tokens,
      offset=build.vocabulary.offset,
    )
    tiles.write(values.trace, shown)
    print(f"wrote {values.trace}")
  return {"pictures": len(pictures), "image": values.image} | _cost(
    drawn.sampled
  )


def _answered(run, values, sampler, prompts) -> Mapping[str, Any]:
  from dllm_jax.run import images  # noqa: PLC0415
  from dllm_jax.sampling.traces import write  # noqa: PLC0415

  if len(prompts) > 1:
    raise commands.UsageError("give one --prompt, the question, with pictures")
  if values.trace:
    write.check(values.trace)
  texts, sampled = images.answer(
    run,
    [(name, _read(name)) for name in values.input_image],
    prompts[0],
    new_tokens=values.new_tokens or None,
    seed=values.seed,
    sampler=sampler,
    use_ema=values.use_ema,
    trace=bool(values.trace),
  )
  for name, text in zip(values.input_image, texts, strict=True):
    print(f"--- {name}\n{text}", flush=True)
  if values.trace:
    write.trace(values.trace, sampled.generation.trace, run.tokenizer.decode)
    print(f"wrote {values.trace}")
  return {"samples": texts} | _cost(sampled)


def _read(name: str) -> bytes:
  path = paths.place(name)
  if not path.is_file():
    raise commands.UsageError(f"--input_image={name} is no file")
  return path.read_bytes()


def _cost(sampled) -> dict[str, Any]:
  calls = sampled.generation.function_evaluations.tolist()
  return {
    "function_evaluations": max(calls),
    "tokens_per_second": sampled.new_tokens / sampled.seconds,
    "compile_seconds": sampled.compile_seconds,
  }

"""`dllm convert`: published weights in and out."""

from collections.abc import Mapping
from typing import Any

from dllm_jax.cli import command as commands


def _define(flag: commands.Flags) -> None:
  flag.path(
    "from_hf", "", "a published folder to import (config.json, safetensors)"
  )
  flag.path("to_hf", "", "a new folder to export the run to")
  flag.path(
    "from_peft",
    "",
    "with --from_hf: a folder of PEFT's, whose adapters the run begins with",
  )
  flag.path("to_peft", "", "a new folder for the run's adapters, as PEFT's")
  flag.path(
    "workdir", None, "the run: new for --from_hf, existing for what goes out"
  )
  flag.string(
    "as",
    "",
    "with --from_hf: the diffusion (dream, llada, bd3lm) to start from"
    " autoregressive weights; with --to_hf: the family whose layout a run that"
    " was trained from scratch is written in",
  )
  flag.enum(
    "dtype",
    "",
    ["", "float32", "bfloat16"],
    "type of the parameters; by default what the files have",
  )
  flag.integer(
    "mask_id", -1, "the mask token, where the folder does not name it"
  )
  flag.integer(
    "length",
    0,
    "tokens of a row; 0 for the trained length, at most 512",
    lower_bound=0,
  )
  flag.use_ema("export")


def _run(argv: list[str]) -> Mapping[str, Any]:
  values = commands.parse(COMMAND, argv)
  workdir = commands.required(values, "workdir", "runs/llada")
  ways = (values.from_hf, values.to_hf, values.to_peft)
  if sum(map(bool, ways)) != 1:
    raise commands.UsageError("give --from_hf, --to_hf or --to_peft, one of them")
  if values.from_peft and not values.from_hf:
    raise commands.UsageError(
      "--from_peft are adapters for --from_hf: give the folder of their weights"
    )

  from dllm_jax.run import exchange  # pylint: disable=g-import-not-at-top

  dtype = values.dtype or None
  if values.to_peft:
    result = exchange.export_adapters(
      workdir, values.to_peft, use_ema=values.use_ema
    )
    print(f"wrote {values.to_peft}")
    return result
  if values.to_hf:
    result = exchange.export_run(
      workdir,
      values.to_hf,
      family=values["as"].value or None,
      use_ema=values.use_ema,
      dtype=dtype,
    )
    print(f"wrote {values.to_hf}")
    return result
  result = exchange.import_folder(
    values.from_hf,
    workdir,
    target=values["as"].value or None,
    dtype=dtype,
    mask_id=None if values.mask_id < 0 else values.mask_id,
    length=values.length or None,
    adapters=values.from_peft or None,
  )
  print(f"{workdir} is a run now: dllm sample --workdir={workdir}")
  return result


COMMAND = commands.Command(
  name="convert",
  summary="Imports published weights into a run, or exports a run.",
  define=_define,
  run=_run,
)

"""`dllm convert`: published weights and PEFT's adapters, in and out."""

from collections.abc import Mapping
from typing import Any

from dllm_jax.cli import command as commands


def _define(flag: commands.Flags) -> None:
  flag.path(
    "from_hf", "", "a published folder to import (config.json, safetensors)"
  )
  flag.path("to_hf", "", "a new folder to export the run to")
  flag.path(
    "to_peft", "", "a new folder to write the run's adapters to for PEFT"
  )
  flag.path(
    "adapter", "", "with --from_hf: a folder of PEFT's, for its weights"
  )
  flag.path("workdir", None, "the run: new for --from_hf, or else existing")
  flag.string(
    "as",
    "",
    "with --from_hf: the diffusion (dream, llada, bd3lm) to start from"
    " autoregressive weights, or what a folder named SDAR's holds (sdar, idlm);"
    " with --to_hf: the family whose layout a run that"
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
  flag.path(
    "image_tokenizer",
    "",
    "with --from_hf of a model with image tokens: the folder of what makes them,"
    " showlab/magvitv2's files, which is kept in the run",
  )
  flag.use_ema("export")


def _run(argv: list[str]) -> Mapping[str, Any]:
  values = commands.parse(COMMAND, argv)
  workdir = commands.required(values, "workdir", "runs/llada")
  given = [bool(values[x].value) for x in ("from_hf", "to_hf", "to_peft")]
  if sum(given) != 1:
    raise commands.UsageError("give one of --from_hf, --to_hf, --to_peft")
  if values.adapter and not values.from_hf:
    raise commands.UsageError(
      "--adapter is read onto the weights of --from_hf; give both, or write"
      " one with --to_peft"
    )

  from dllm_jax.run import exchange  # pylint: disable=g-import-not-at-top

  dtype = values.dtype or None
  if not values.from_hf:
    write = exchange.export_run if values.to_hf else exchange.export_adapter
    result = write(
      workdir,
      values.to_hf or values.to_peft,
      family=values["as"].value or None,
      use_ema=values.use_ema,
      dtype=dtype,
    )
    print(f"wrote {values.to_hf or values.to_peft}")
    return result
  result = exchange.import_folder(
    values.from_hf,
    workdir,
    target=values["as"].value or None,
    adapter=values.adapter or None,
    dtype=dtype,
    mask_id=None if values.mask_id < 0 else values.mask_id,
    length=values.length or None,
    image_tokenizer=values.image_tokenizer or None,
  )
  print(f"{workdir} is a run now: dllm sample --workdir={workdir}")
  return result


COMMAND = commands.Command(
  name="convert",
  summary="Imports published weights into a run, or exports a run.",
  define=_define,
  run=_run,
)

"""`dllm prepare`: tokenises a corpus once into ArrayRecord files."""

from collections.abc import Mapping
from typing import Any

from dllm_jax.cli import command as commands


def _define(flag: commands.Flags) -> None:
  flag.path(
    "input", None, "text, JSONL or Parquet: a file, a directory or a glob"
  )
  flag.string(
    "tokenizer",
    "byte",
    "char, byte, bpe:N for N byte pairs learned from the training text, or the "
    "path of a tokenizer.json",
  )
  flag.path(
    "output",
    None,
    "directory of the token records; an interrupted preparation continues",
  )
  flag.integer("length", 1024, "tokens in a record", lower_bound=2)
  flag.enum(
    "packing",
    "slices",
    ("slices", "packed"),
    "slices cuts one stream of tokens; packed keeps documents apart",
  )
  flag.integer("workers", 0, "processes; 0 for one a core", lower_bound=0)
  flag.float(
    "held_out",
    0.1,
    "fraction of the text to hold out",
    lower_bound=0.0,
    upper_bound=0.9,
  )
  flag.string("text_field", "text", "field of the text in JSONL and Parquet")
  flag.string(
    "mask_token", None, "the token of tokenizer.json that is the mask"
  )


def _run(argv: list[str]) -> Mapping[str, Any]:
  values = commands.parse(COMMAND, argv)
  source = commands.required(values, "input", "corpus/*.jsonl")
  output = commands.required(values, "output", "prepared")

  from dllm_jax import data  # pylint: disable=g-import-not-at-top

  result = data.prepare(
    source,
    values.tokenizer,
    output,
    length=values.length,
    packing=values.packing,
    workers=values.workers or None,
    held_out=values.held_out,
    text_field=values.text_field,
    mask_token=values.mask_token,
  )
  print(
    f"{result['documents']} documents, {result['tokens']} tokens in "
    f"{result['files']} files under {output}; train on them with "
    f"--config.data.path={output}"
  )
  return result


COMMAND = commands.Command(
  name="prepare",
  summary="Tokenises a corpus once into ArrayRecord files, in parallel.",
  define=_define,
  run=_run,
)

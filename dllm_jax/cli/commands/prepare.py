"""`dllm prepare`: tokenises a corpus once into ArrayRecord files.

Alone, or on as many machines as there are: docs/prepare.md.
"""

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
    "directory of the token records, in a bucket or not; an interrupted "
    "preparation continues",
  )
  flag.string(
    "shard",
    None,
    "do one of several shares, such as 0/64 (the first) or 63/64 (the last); "
    "all write to one output, and the last to end makes it one corpus",
  )
  flag.bool(
    "merge",
    False,
    "only make the shares under --output one corpus, or say what is missing",
  )
  flag.enum(
    "dedup",
    "none",
    ("none", "exact"),
    "exact leaves out documents whose text was there before, in any file",
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
  output = commands.required(values, "output", "prepared")
  if values.merge and (values.input or values.shard):
    raise commands.UsageError(
      "--merge takes --output only: what was prepared says the rest"
    )
  if values.merge:
    from dllm_jax import data  # pylint: disable=g-import-not-at-top

    result = data.merge(output)
  else:
    result = _prepare(values, output)
  missing = result["missing_pieces"]
  print(
    f"{result['documents']} documents, {result['tokens']} tokens in "
    f"{result['files']} files under {output}; "
    + (
      f"{missing} pieces are left to the other shards"
      if missing
      else f"train on them with --config.data.path={output}"
    )
  )
  return result


def _prepare(values: Any, output: str) -> Mapping[str, Any]:
  source = commands.required(values, "input", "corpus/*.jsonl")

  from dllm_jax import data  # pylint: disable=g-import-not-at-top

  return data.prepare(
    source,
    values.tokenizer,
    output,
    length=values.length,
    packing=values.packing,
    workers=values.workers or None,
    held_out=values.held_out,
    text_field=values.text_field,
    mask_token=values.mask_token,
    dedup=None if values.dedup == "none" else values.dedup,
    shard=values.shard,
  )


COMMAND = commands.Command(
  name="prepare",
  summary="Tokenises a corpus once into ArrayRecord files, in parallel.",
  define=_define,
  run=_run,
)

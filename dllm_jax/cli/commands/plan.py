"""`dllm plan`: what a configuration costs on a machine that is not here."""

from collections.abc import Mapping
import dataclasses
import json
from typing import Any

from dllm_jax.cli import command as commands
from dllm_jax.config import files
from dllm_jax.core import paths


def _define(flag: commands.Flags) -> None:
  flag.string(
    "topology", None, "the machine: v5p:4x4x8, v6e:16x16, h200:8x8, ..."
  )
  flag.integer("slices", 1, "TPU slices of that shape", lower_bound=1)
  flag.enum(
    "program",
    "train",
    ["train", "sample", "reinforce"],
    "the train step, the sampler, or the update of dllm reinforce",
  )
  flag.bool("search", False, "try meshes, remat policies and microbatches")
  flag.integer(
    "compiled", 3, "candidates of a search that are compiled", lower_bound=1
  )
  flag.integer(
    "rows",
    1,
    "rows a device (tensor parallel devices count as one) samples together",
    lower_bound=1,
  )
  flag.integer(
    "vocab_size",
    None,
    "tokens of the vocabulary; by default as the file of the configuration or "
    "its data say",
    lower_bound=2,
  )
  flag.path(
    "output", None, "a directory for plan.json, memory.svg and roofline.svg"
  )


def _run(argv: list[str]) -> Mapping[str, Any]:
  name, _ = commands.take(argv, "config")
  topology, _ = commands.take(argv, "topology")
  known = files.machines(name) if name else {}
  if topology in known and ":" not in (name or ""):
    _, argv = commands.take(argv, "config")
    argv = [f"--config={name}:{topology}", *argv]
    print(f"with the mesh of {name} for {topology}")
  values = commands.parse(COMMAND, argv)
  resolved = commands.required(values, "config", "llada_8b")
  commands.required(values, "topology", "v5p:4x4x8")

  import jax  # pylint: disable=g-import-not-at-top

  # Compilers of other platforms are asked by name; nothing is computed here.
  jax.config.update("jax_platforms", "cpu")

  from dllm_jax import planning  # pylint: disable=g-import-not-at-top
  from dllm_jax.parallel import topology as machines  # pylint: disable=g-import-not-at-top
  from dllm_jax.planning import report  # pylint: disable=g-import-not-at-top

  machine = machines.machine(values.topology, slices=values.slices)
  tokenizer = report.vocabulary(
    resolved, values.vocab_size or files.vocab_size(name)
  )
  if values.search:
    resolved, found = planning.search(
      resolved, machine, tokenizer, compiled=values.compiled
    )
  else:
    found = planning.plan(
      resolved,
      machine,
      tokenizer,
      program=values.program,
      methods=files.methods(name),
      rows=values.rows,
    )
  if not found.fits:
    found = report.advised(found, resolved, machine, tokenizer)
  print(report.text(found))
  result = {"config": name, **dataclasses.asdict(found)}
  if values.output:
    folder = paths.place(values.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(json.dumps(result, indent=2) + "\n")
    for kind, picture in report.pictures({found.topology: found}).items():
      (folder / f"{kind}.svg").write_text(picture)
  return result


COMMAND = commands.Command(
  name="plan",
  summary="Compiles the train step or the sampler for a machine that is not "
  "here, and tells memory, FLOPs, traffic and the least time of a step.",
  define=_define,
  run=_run,
  overrides=("config",),
)

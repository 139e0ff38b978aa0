"""`dllm configs`: lists the bundled configurations."""

from collections.abc import Mapping
from typing import Any

from dllm_jax.cli import command as commands
from dllm_jax.config import files


def _run(argv: list[str]) -> Mapping[str, Any]:
  commands.parse(COMMAND, argv)
  found = files.bundled()
  width = max(map(len, found), default=0)
  for name, text in found.items():
    print(f"{name:<{width}}  {text}")
  return {"configs": list(found)}


COMMAND = commands.Command(
  name="configs",
  summary="Lists the bundled configurations with one line each.",
  define=lambda flag: None,
  run=_run,
)

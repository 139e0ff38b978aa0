"""`dllm harness`: the `lm_eval` command, which then knows the model dllm_jax."""

from collections.abc import Mapping
import importlib.util
from typing import Any

from dllm_jax.cli import command as commands
from dllm_jax.core import paths


def _run(argv: list[str]) -> Mapping[str, Any]:
  if importlib.util.find_spec("lm_eval") is None:
    raise commands.UsageError(
      "dllm harness needs lm-evaluation-harness; install dllm_jax[eval]"
    )
  from dllm_jax.evaluation.harness import model  # pylint: disable=g-import-not-at-top

  models = model.main([_expanded(argument) for argument in argv])
  return {"models": [model.get_model_info() for model in models]}


def _expanded(argument: str) -> str:
  """Returns `--flag=~/x` with the home directory, which shells leave alone."""
  flag, equals, value = argument.partition("=")
  if flag.startswith("--") and value.startswith("~"):
    return f"{flag}{equals}{paths.expanded(value)}"
  return argument


COMMAND = commands.Command(
  name="harness",
  summary=(
    "Runs lm-evaluation-harness. All flags are those of `lm_eval` (see dllm "
    "harness run -h), for example --model dllm_jax --model_args "
    "workdir=runs/mine,protocol=llada --tasks TASK --include_path DIR"
  ),
  define=lambda flag: None,
  run=_run,
)

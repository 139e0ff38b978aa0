"""`--task=likelihood`: the bound of held-out text, with its standard error."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from dllm_jax.evaluation.registry import option, Setting, Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Likelihood:
  """What `--task=likelihood` is told.

  Attributes: as their help says.
  """

  passes: int = option(0, "passes over the text; 0 for the run's own number")
  batches: int = option(0, "at most so many held-out batches; 0 for all")

  def __post_init__(self):
    if self.passes < 0 or self.passes == 1:
      raise ValueError(
        f"--passes must be at least 2 (the standard error needs two), or 0 for "
        f"the run's own number, not {self.passes}"
      )
    if self.batches < 0:
      raise ValueError(f"--batches must be at least 0, not {self.batches}")


def _run(setting: Setting, options: Likelihood) -> Mapping[str, Any]:
  return setting.run.evaluate(
    passes=options.passes or None,
    limit=options.batches or None,
    use_ema=setting.use_ema,
    progress=setting.progress,
  )


def _text(figures: Mapping[str, Any]) -> str:
  return (
    f"at most {figures['bits_per_token']:.4f} bits per token "
    f"(standard error {figures['standard_error']:.4f}), "
    f"{figures['bits_per_char']:.4f} bits per character, on "
    f"{figures['tokens']} tokens"
  )


TASK = Task(
  summary="the likelihood bound of held-out text",
  run=_run,
  text=_text,
  options=Likelihood,
)

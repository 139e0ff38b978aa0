"""What a run shows of itself while it trains."""

from typing import Any

from dllm_jax.sampling.requests import answered
from dllm_jax.training.step import TrainState


def shown(run: Any, state: TrainState) -> list[str]:
  """Returns a sample of a run, or its answers to held-out prompts."""
  asked = run.corpus.prompts
  if not asked:
    return run.sample(state=state).texts
  rows = [[*ids, *[None] * new] for ids, new in asked]
  found = run.sample_rows(rows, state=state).rows
  ends, decode = run.tokenizer.end_ids, run.tokenizer.decode
  return [
    f"{decode(ids).strip()}\n-> {decode(answered(new, row, ends)).strip()}"
    for (ids, _), new, row in zip(asked, found, rows, strict=True)
  ]

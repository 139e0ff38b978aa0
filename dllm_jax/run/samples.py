"""What a run samples, and what it shows of itself while it trains."""

import dataclasses
from typing import Any

import jax
from jaxtyping import PyTree

from dllm_jax.core.types import Process
from dllm_jax.sampling.generator import Plan, Sampled
from dllm_jax.sampling.requests import answered
from dllm_jax.training.checkpoint import Checkpoints, started
from dllm_jax.training.step import TrainState


def sampled(
  run: Any,
  plan: Plan,
  *,
  state: TrainState | None,
  use_ema: bool,
  seed: int,
  trace: bool,
) -> Sampled:
  """Returns samples of what was planned.

  Args:
    run: whose network.
    plan: what is wanted.
    state: whose parameters; None for the newest checkpoint's, read while the
      sampler is compiled.
    use_ema: whether to use averaged parameters where there are any.
    seed: this and what follows as of a `Generator`.

  Raises:
    FileNotFoundError: there is no checkpoint.
  """
  before = 0.0
  if state is None:
    if _to_be_read(run):
      arrays = _arrays(run.served.abstract, use_ema)
      read = started(lambda: run.state)
      before = run.generator.compile(*arrays, plan, trace=trace)
      read()
    state = run.state
  arrays = _arrays(state, use_ema)
  found = run.generator(*arrays, plan, seed=seed, trace=trace)
  seconds = found.compile_seconds + before
  return dataclasses.replace(found, compile_seconds=seconds)


def _to_be_read(run: Any) -> bool:
  """Whether a checkpoint is there and not read, by one process alone.

  Several compile what they run together, in one order.
  """
  if "state" in vars(run) or jax.process_count() > 1:
    return False
  with Checkpoints(run.workdir, writes=False) as checkpoints:
    return bool(checkpoints.steps())


def _arrays(state: TrainState, use_ema: bool) -> tuple[PyTree, Process]:
  """Returns the parameters of the network and the process, or abstract ones."""
  params = state.eval_params if use_ema else state.params
  return params["model"], state.process.replace(params=params["process"])


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

"""Reinforcement learning of a run: what it is told, and the whole of it.

The loop, its checkpoints and its log are those of `dllm train`; a step is an
update on rollouts that were made before it.
"""

import dataclasses
import importlib.util
import os
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from dllm_jax.config import config as configs
from dllm_jax.core import check
from dllm_jax.posttraining.reinforcement import problems as problems_lib
from dllm_jax.posttraining.reinforcement import record, scoring
from dllm_jax.posttraining.reinforcement.iterations import Iterations, Shape
from dllm_jax.posttraining.reinforcement.methods import value
from dllm_jax.posttraining.reinforcement.methods.base import (
  Method,
  Reinforced,
)
from dllm_jax.posttraining.reinforcement.methods.tracerl import TraceRL
from dllm_jax.posttraining.reinforcement.rewards import judges, registry
from dllm_jax.posttraining.reinforcement.rewards.pool import Asked, Rewards
from dllm_jax.posttraining.reinforcement.rollouts import answer, Rollouts, rows
from dllm_jax.posttraining.reinforcement.sampled import Sampling
from dllm_jax.posttraining.train import train
from dllm_jax.run.begin import begin
from dllm_jax.run.run import Run
from dllm_jax.training.checkpoint import steps_in
from dllm_jax.training.step import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reinforce:
  """What reinforcement learning is told, besides its method.

  Attributes:
    problems: puzzles that are made (sudoku4, sudoku9, countdown3 to 5), or a file
      of JSON lines with a prompt or messages.
    count: problems to learn from; 0 for all of a file, or 1000 puzzles.
    held_out: others, on which it is evaluated.
    rewards: name=weight with commas between, see `rewards.registry`.
    prompts: prompts of an iteration.
    new_tokens: slots of an answer; 0 for what the longest prompt leaves.
    end: text that ends an answer, where the tokenizer has no token for it; "" for
      the end of a puzzle, or none.
    rows: rollouts that are sampled at once; 0 for all of an iteration.
    seconds: time that a reward has for an answer.
    processes: that compute rewards; 0 for as many as there are cores.
    seed: of problems, of their order, of rollouts and of masks.
  """

  problems: str = "countdown3"
  count: int = 0
  held_out: int = 100
  rewards: str = "countdown=1"
  prompts: int = 8
  new_tokens: int = 0
  end: str = ""
  rows: int = 0
  seconds: float = 10.0
  processes: int = 0
  seed: int = 0

  def __post_init__(self):
    check.at_least(self, 1, "prompts", prefix="reinforce.")
    check.at_least(
      self,
      0,
      "count",
      "held_out",
      "new_tokens",
      "rows",
      "processes",
      "seed",
      prefix="reinforce.",
    )
    if self.seconds <= 0:
      raise ValueError(f"reinforce.seconds must be above 0, not {self.seconds}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Told:
  """What `method.json` holds of a run."""

  algorithm: str
  options: Method
  told: Reinforce


_Told.__name__ = "Reinforce"


class Reinforcement:
  """A run that its own rollouts train.

  Args:
    source: the run to begin with, and the reference.
    output: the directory of the new one, new or already begun.
    resolved: its configuration; `sampler` says how rollouts are sampled.
    told: problems, rewards, and how many of them.
    method: the loss.

  Attributes:
    run: the run.

  Raises:
    ValueError: what was given does not fit; nothing is written then.
    FileNotFoundError: there are no problems, or no checkpoint.
  """

  def __init__(
    self,
    source: Run,
    output: str | os.PathLike,
    resolved: ConfigDict,
    told: Reinforce,
    method: Method,
  ):
    if jax.process_count() > 1:
      raise ValueError(
        "dllm reinforce runs in one process, with all of its devices; start one"
      )
    config = configs.parse(resolved)
    if importlib.util.find_spec("pebble") is None:
      raise ValueError(
        "rewards need Pebble: pip install 'dllm_jax[reinforce]', or pebble"
      )
    self._terms = registry.parse(told.rewards)
    judges.check(self._terms)
    method.check(source.objective)
    _check_sampler(config.sampler)
    found = problems_lib.load(
      told.problems,
      source.tokenizer,
      count=told.count,
      held_out=told.held_out,
      seed=told.seed,
    )
    self._train, self._held_out = found
    self._told = told
    length = config.data.length
    longest = max(len(p.tokens) for p in [*found[0], *found[1]])
    new = told.new_tokens or length - longest
    if new < 1:
      raise ValueError(
        f"the longest prompt has {longest} tokens and leaves no room for an"
        f" answer on a canvas of {length}: raise config.data.length"
      )
    problems_lib.check([*found[0], *found[1]], self._terms, room=length - new)
    self._shape = _shape(told, method, config.training)
    self._ends = _ends(told, source)
    self._source = source
    self._sampling = Sampling(
      run=source,
      length=length,
      new_tokens=new,
      rows=told.rows or self._shape.rollouts,
      sampler=config.sampler,
      seed=told.seed,
    )
    plan = self._sampling.plan([self._train[0]], [0])  # legal, before all else
    self._method = _with_views(method, plan.sampler, new, source.objective)
    record_of = _Told(algorithm=method.name, options=method, told=told)
    self._grown = _grown(method, source, config)
    self.run = begin(source, output, resolved, record_of, self._grown)
    self._sampling = dataclasses.replace(self._sampling, run=self.run)

  def describe(self) -> str:
    """Returns one line on what is to be done."""
    shape, training = self._shape, self.run.config.training
    return (
      f"{self._method.name} on {len(self._train)} problems of"
      f" {self._told.problems}, {len(self._held_out)} held out:"
      f" {training.steps / shape.steps:.4g} iterations of {shape.prompts} x"
      f" {shape.group} rollouts with {shape.steps} updates of"
      f" {training.batch_size}"
    )

  def train(self) -> dict[str, Any]:
    """Trains, or continues, to the configured step; returns a summary."""
    run, told, method = self.run, self._told, self._method
    with Rewards(
      self._terms,
      seconds=told.seconds,
      processes=told.processes,
      judge=judges.Judges(),
    ) as rewards:
      old = scoring.scorer(method, run.objective, run.denoiser, run.mesh)
      objective = Reinforced(
        objective=run.objective, method=method, denoiser=run.denoiser
      )
      iterations = Iterations(
        shape=self._shape,
        method=method,
        sampling=self._sampling,
        problems=self._train,
        rewards=rewards,
        old=old,
        reference=scoring.reference(method, run, self._source)
        if method.asks_reference
        else None,
        values=scoring.valuer(objective, run.mesh) if self._grown else None,
        ends=self._ends,
        seed=told.seed,
      )

      def collect(state: TrainState) -> dict[str, float]:
        figures = iterations.collect(state)
        if figures:
          steps = steps_in(run.workdir) or [0]
          record.forget(run.workdir, min(steps[-2:]) // self._shape.steps)
        return figures

      return train(
        run,
        objective,
        grown=self._grown,
        batches=iterations,
        blank=blank(
          method,
          run,
          new_tokens=self._sampling.new_tokens,
          asks=self._shape.steps > 1,
        ),
        evaluate=self._evaluate(rewards) if self._held_out else None,
        collect=collect,
        sample=lambda state: iterations.shown(),
      )

  def _evaluate(self, rewards: Rewards):
    """Returns state -> what the held-out problems earn, by the same sampler."""
    evaluation = self.run.config.evaluation
    most = evaluation.batches * evaluation.batch_size or len(self._held_out)
    asked = self._held_out[:most]
    sampling = dataclasses.replace(
      self._sampling,
      rows=min(evaluation.batch_size, len(asked)),
      sampler=dataclasses.replace(self._sampling.sampler, temperature=0.0),
    )
    decode = self.run.tokenizer.decode

    def evaluate(state: TrainState) -> dict[str, float]:
      pending, calls, done = [], 0, 0
      for part in sampling.parts(state, asked, 0):
        here = asked[done : done + len(part.tokens)]
        done += len(part.tokens)
        calls += int(part.calls.sum())
        texts = [
          decode(answer(tokens, given, sampling.new_tokens, self._ends))
          for tokens, given in zip(part.tokens, part.given, strict=True)
        ]
        pending.append(
          rewards.ask([
            Asked(p.prompt, text, p.row)
            for p, text in zip(here, texts, strict=True)
          ])
        )
      earned = [one for answers in pending for one in answers.wait()]
      figures = {
        "eval_reward": float(np.mean([one.total for one in earned])),
        "eval_calls": calls / len(asked),
      }
      for name in earned[0].parts:
        values = [one.parts[name] or 0.0 for one in earned]
        figures[f"eval_{name}"] = float(np.mean(values))
      return figures

    return evaluate


def _grown(method: Method, source: Run, config: configs.Config):
  """Returns what makes a value model of a policy, None where none is wanted.

  Raises:
    ValueError: the policy trains adapters, and the value model would be whole.
  """
  if not getattr(method, "value", False):
    return None
  adapter = getattr(config.network(source.objective), "adapter", None)
  if adapter is not None and adapter.rank:
    raise ValueError(
      "a value model is a whole network beside the policy: leave"
      " config.model.adapter.rank 0, or set tracerl.value to False"
    )
  width = config.model["width"]
  return lambda model: value.grown(model, width)


def blank(method: Method, run: Run, *, new_tokens: int, asks: bool) -> Rollouts:
  """Returns a batch of the form of an update's.

  Args:
    method: what it is for.
    run: whose network and configuration.
    new_tokens: slots of an answer.
    asks: whether the old policy is asked, if the method wants it: not where an
      iteration is one update.
  """
  config = run.config
  shape = (config.training.batch_size, config.data.length)
  batch = rows(np.zeros(shape, np.int32), np.ones(shape[0]), new_tokens, ())
  if getattr(method, "value", False):
    zeros = np.zeros(shape, np.float32)
    batch = batch.replace(returns=zeros, values=zeros)
  asks &= method.by_ratio
  if not asks and not method.asks_reference:
    return batch
  said = scoring.shape(method, run, batch)
  said = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), said)
  return batch.replace(
    old=said if asks else None,
    reference=said if method.asks_reference else None,
  )


def _check_sampler(sampler: Any) -> None:
  """Raises ValueError if all rollouts of a prompt would be the same."""
  if sampler.options().temperature == 0.0:
    raise ValueError(
      "with sampler.temperature 0 all rollouts of a prompt are the same, and"
      " teach nothing: set config.sampler.temperature, for example to 1"
    )


def _shape(told: Reinforce, method: Method, training: Any) -> Shape:
  """Returns how iterations are cut.

  Raises:
    ValueError: an update's batch does not divide an iteration's rollouts.
  """
  shape = Shape(
    prompts=told.prompts,
    group=method.group,
    batch=training.batch_size,
    passes=method.iterations,
  )
  if shape.rollouts % shape.batch:
    raise ValueError(
      f"training.batch_size {shape.batch}, the rollouts of an update, must"
      f" divide the {shape.rollouts} of an iteration (reinforce.prompts"
      f" {told.prompts} x {method.name}.group {method.group})"
    )
  return shape


def _ends(told: Reinforce, source: Run) -> tuple[int, ...]:
  """Returns the tokens that end an answer.

  Raises:
    ValueError: the text that does is not one token.
  """
  tokenizer = source.tokenizer
  end = told.end or problems_lib.end_of(told.problems)
  if not end:
    return tuple(tokenizer.end_ids)
  ids = [int(i) for i in tokenizer.encode(end)]
  if len(ids) != 1:
    raise ValueError(
      f"reinforce.end {end!r} is {len(ids)} tokens: name a text that is one"
    )
  return (*tokenizer.end_ids, *ids)


def _with_views(
  method: Method, sampler: Any, new_tokens: int, objective: Any
) -> Method:
  """Returns a method with as many views as the sampler's steps may need."""
  if not isinstance(method, TraceRL) or method.views_a_row:
    return method
  block = min(sampler.block_length or new_tokens, new_tokens)
  blocks = 1 if objective.block_length else -(-new_tokens // block)
  steps = min(new_tokens, blocks * min(block, sampler.steps))
  return dataclasses.replace(method, views_a_row=-(-steps // method.shrink))

"""Rollouts by the sampler's one program, on the mesh and with the parameters
that train: rows of one canvas, in parts of one size.
"""

from collections.abc import Iterator, Sequence
import dataclasses
from typing import NamedTuple

import jax
from jaxtyping import Float, Int
import numpy as np

from dllm_jax.parallel.sharding import global_batch
from dllm_jax.posttraining.reinforcement.problems import Problem
from dllm_jax.run.run import Run
from dllm_jax.sampling import requests
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.training.step import TrainState


class Part(NamedTuple):
  """Some finished canvases.

  Attributes:
    tokens: the canvases.
    given: tokens before each answer.
    revealed_at: the step at which each slot was revealed.
    log_prob: of what was drawn there, nats.
    calls: network calls of each.
    seconds: of the program, compilation apart.
  """

  tokens: Int[np.ndarray, "B L"]
  given: Int[np.ndarray, "B"]
  revealed_at: Int[np.ndarray, "B L"]
  log_prob: Float[np.ndarray, "B L"]
  calls: Int[np.ndarray, "B"]
  seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How rollouts are sampled.

  Attributes:
    run: whose network.
    length: slots of the canvas.
    new_tokens: slots of an answer.
    rows: rollouts that are sampled at once.
    sampler: how.
    seed: of the noise; a rollout's depends on it and on its number alone.
  """

  run: Run
  length: int
  new_tokens: int
  rows: int
  sampler: SamplerConfig
  seed: int

  def plan(self, problems: Sequence[Problem], numbers: Sequence[int]):
    """Returns what is asked of the sampler for some problems."""
    templates = [
      requests.continuation(
        p.tokens, length=self.length, new_tokens=self.new_tokens
      )
      for p in problems
    ]
    return self.run.generator.plan(
      templates, length=self.length, sampler=self.sampler, numbers=numbers
    )

  def parts(
    self, state: TrainState, problems: Sequence[Problem], first: int
  ) -> Iterator[Part]:
    """Yields finished canvases, `rows` at a time.

    Args:
      state: whose parameters.
      problems: one for each rollout.
      first: the number of the first rollout.
    """
    run = self.run
    for start in range(0, len(problems), self.rows):
      here = list(problems[start : start + self.rows])
      count = len(here)
      here += [here[-1]] * (self.rows - count)
      numbers = [first + start + i for i in range(self.rows)]
      plan = self.plan(here, numbers)
      plan = dataclasses.replace(plan, batch=global_batch(plan.batch, run.mesh))
      process = state.process.replace(params=state.params["process"])
      sampled = run.generator(
        state.params["model"], process, plan, seed=self.seed
      )
      made = jax.device_get(sampled.generation)
      given = np.argmax(~np.asarray(jax.device_get(plan.batch.fixed)), axis=1)
      yield Part(
        tokens=np.asarray(made.tokens)[:count],
        given=given[:count],
        revealed_at=np.asarray(made.revealed_at)[:count],
        log_prob=np.asarray(made.log_prob)[:count],
        calls=np.asarray(made.function_evaluations)[:count],
        seconds=sampled.seconds,
      )

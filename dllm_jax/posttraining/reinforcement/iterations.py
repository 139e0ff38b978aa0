"""Iterations: rollouts of the newest policy, then updates on them.

    step   0 ......... k-1 | k ......... 2k-1 | ...
           rollouts        | rollouts
           old scores      | old scores
           pass 0: parts 0 .. p-1, pass 1: parts 0 .. p-1, ...

Batch n is a function of the seed, of n, and of the parameters at the iteration's
first step, which what is written then stands for.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import itertools
import time
from typing import Any

import numpy as np

from dllm_jax.posttraining.reinforcement import record
from dllm_jax.posttraining.reinforcement.methods.advantages import (
  advantages,
  equal,
)
from dllm_jax.posttraining.reinforcement.methods.base import Method
from dllm_jax.posttraining.reinforcement.methods.value import credit
from dllm_jax.posttraining.reinforcement.problems import endless, Problem
from dllm_jax.posttraining.reinforcement.rewards.pool import (
  Asked,
  Earned,
  Rewards,
)
from dllm_jax.posttraining.reinforcement.rollouts import answer, Rollouts, rows
from dllm_jax.posttraining.reinforcement.sampled import Part, Sampling
from dllm_jax.posttraining.reinforcement.scoring import Score
from dllm_jax.training.step import TrainState

_SEEDS = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
  """How an iteration is cut into updates.

  Attributes:
    prompts: of an iteration.
    group: rollouts of each.
    batch: rollouts of an update.
    passes: over the rollouts.
  """

  prompts: int
  group: int
  batch: int
  passes: int

  @property
  def rollouts(self) -> int:
    """Rollouts of an iteration."""
    return self.prompts * self.group

  @property
  def parts(self) -> int:
    """Updates of a pass."""
    return self.rollouts // self.batch

  @property
  def steps(self) -> int:
    """Updates of an iteration."""
    return self.passes * self.parts


class Iterations(Iterator[Rollouts]):
  """Batches of updates, for which rollouts are made where they are due.

  Args:
    shape: how an iteration is cut.
    method: what it is trained with.
    sampling: how rollouts are made.
    problems: what is asked.
    rewards: what they earn; entered.
    old: what the policy says, if the method asks.
    reference: what the reference says, if it does.
    values: what the value model says, if there is one.
    ends: tokens that end an answer.
    seed: of the order of problems and of masks.
  """

  def __init__(
    self,
    *,
    shape: Shape,
    method: Method,
    sampling: Sampling,
    problems: Sequence[Problem],
    rewards: Rewards,
    old: Score | None,
    reference: Score | None,
    values: Score | None,
    ends: tuple[int, ...],
    seed: int,
  ):
    self._shape, self._method, self._sampling = shape, method, sampling
    self._problems, self._rewards = problems, rewards
    self._old, self._reference, self._values = old, reference, values
    self._ends, self._seed = ends, seed & 0x7FFFFFFF
    self._batch, self._now = 0, -1
    self._arrays: dict[str, Any] = {}
    self._last: list[dict[str, Any]] = []
    self._workdir = sampling.run.workdir

  # What the training loop asks of batches.

  def collect(self, state: TrainState) -> dict[str, float]:
    """Makes the rollouts of an iteration that begins; returns its figures.

    Args:
      state: of the policy; nothing is made in the middle of an iteration.
    """
    iteration, inside = divmod(self._batch, self._shape.steps)
    if iteration == self._now:
      return {}
    self._now = iteration
    if inside:  # resumed: the parameters that sampled are gone
      self._arrays = record.read(self._workdir, iteration)
      return {}
    return self._begin(state, iteration)

  def __next__(self) -> Rollouts:
    iteration, inside = divmod(self._batch, self._shape.steps)
    assert iteration == self._now, "collect comes first"
    self._batch += 1
    return self._part(*divmod(inside, self._shape.parts))

  def get_state(self) -> dict[str, Any]:
    """Returns where the iterator stands."""
    return {"batch": self._batch}

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Continues where a state was taken."""
    self._batch = state["batch"]

  def shown(self, count: int = 2) -> list[str]:
    """Returns some rollouts of the iteration, for people."""
    group = self._shape.group
    return record.shown(self._last[: count * group : group])

  # One iteration.

  def _begin(self, state: TrainState, iteration: int) -> dict[str, float]:
    start = time.perf_counter()
    asked = self._asked(iteration)
    first = iteration * self._shape.rollouts
    parts, pending = [], []
    for part in self._sampling.parts(state, asked, first):
      # Under way while the next part is sampled.
      done = sum(len(p.tokens) for p in parts)
      here = asked[done : done + len(part.tokens)]
      pending.append(self._rewards.ask(self._texts(part, here)))
      parts.append(part)
    whole = _joined(parts)
    self._arrays, batch = self._rows(whole)
    sampled = sum(part.seconds for part in parts)
    scored = time.perf_counter()
    if self._method.by_ratio and self._shape.steps > 1:
      self._score(state, "old", self._old)
    if self._method.asks_reference:
      self._score(state, "reference", self._reference)
    if self._values is not None:
      self._score(state, "values", self._values)
    scored = time.perf_counter() - scored
    earned = [one for answers in pending for one in answers.wait()]
    kept = self._credit(batch, [one.total for one in earned])
    self._last = self._lines(asked, whole, batch, earned)
    record.write(self._workdir, iteration, self._last, self._arrays)
    seconds = time.perf_counter() - start
    return _figures(whole, batch, earned, self._last) | {
      "iteration": iteration,
      "skipped_groups": float(np.mean(~kept)),
      "seconds_sampling": sampled,
      "seconds_scoring": scored,
      "seconds_host": seconds - sampled - scored,
    }

  def _asked(self, iteration: int) -> list[Problem]:
    """Returns the problem of each rollout."""
    shape = self._shape
    numbers = endless(len(self._problems), self._seed)
    start = iteration * shape.prompts
    numbers = itertools.islice(numbers, start, start + shape.prompts)
    return [self._problems[n] for n in numbers for _ in range(shape.group)]

  def _texts(self, part: Part, asked: Sequence[Problem]) -> list[Asked]:
    return [
      Asked(problem.prompt, self._completion(tokens, given), problem.row)
      for problem, tokens, given in zip(
        asked, part.tokens, part.given, strict=True
      )
    ]

  def _completion(self, tokens: np.ndarray, given: int) -> str:
    sampled = self._sampling.new_tokens
    found = answer(tokens, given, sampled, self._ends)
    return self._sampling.run.tokenizer.decode(found)

  def _rows(self, whole: Part) -> tuple[dict[str, Any], Rollouts]:
    batch = rows(
      whole.tokens, whole.given, self._sampling.new_tokens, self._ends
    )
    objective = self._sampling.run.objective
    number, ended = self._method.rounds(batch, whole.revealed_at, objective)
    batch = batch.replace(round=np.asarray(number, np.int32))
    arrays = {
      "tokens": whole.tokens,
      "given": whole.given,
      "round": batch.round,
      "ended": ended,
    }
    return arrays, batch

  def _score(self, state: TrainState, name: str, score: Score) -> None:
    """Asks a policy of each part under the masks of each pass."""
    shape = self._shape
    fresh = shape.passes if self._method.fresh_masks else 1
    said = [
      np.concatenate([
        score(state, self._part(turn, part)) for part in range(shape.parts)
      ])
      for turn in range(fresh)
    ]
    self._arrays[name] = np.stack(said)

  def _credit(self, batch: Rollouts, rewards: Sequence[float]) -> np.ndarray:
    """Sets advantages; returns which groups count."""
    method, shape = self._method, self._shape
    groups = np.asarray(rewards, np.float32).reshape(-1, shape.group)
    found = advantages(groups, baseline=method.baseline, scale=method.scale)
    kept = ~equal(groups) & method.keeps(groups)
    found = np.where(kept[:, None], found, 0.0).ravel()
    counts = np.repeat(kept, shape.group)
    for start in range(0, len(found), shape.batch):
      here = slice(start, start + shape.batch)
      used = counts[here]
      if used.any():
        found[here][used] = method.coefficients(found[here][used])
    self._arrays |= {
      "advantage": np.repeat(
        found[:, None].astype(np.float32), batch.tokens.shape[1], axis=1
      ),
      "counts": counts,
    }
    if self._values is not None:
      # The trajectory's masks are the same in every pass.
      returns, gains = credit(
        self._arrays["ended"],
        batch.loss_mask & counts[:, None],
        self._arrays["values"][0],
        found,
        discount=method.discount,
        trace=method.trace,
      )
      self._arrays |= {"returns": returns, "advantage": gains}
    return kept

  def _part(self, turn: int, part: int) -> Rollouts:
    """Returns the rows of an update, with the seeds of their masks."""
    shape, arrays = self._shape, self._arrays
    here = slice(part * shape.batch, (part + 1) * shape.batch)
    turn = turn if self._method.fresh_masks else 0
    batch = rows(
      arrays["tokens"][here],
      arrays["given"][here],
      self._sampling.new_tokens,
      self._ends,
    )
    rng = np.random.default_rng((self._seed, self._now, turn, part))
    seeds = rng.integers(0, _SEEDS, shape.batch + 1).astype(np.int32)
    batch = batch.replace(
      round=arrays["round"][here],
      seed=seeds[1:],
      batch_seed=np.full(shape.batch, seeds[0]),
      place=(np.arange(shape.batch) / shape.batch).astype(np.float32),
    )
    if "advantage" not in arrays:  # is yet to be scored
      return batch
    # Of a group that teaches nothing no token counts.
    counts = arrays["counts"][here, None]
    given = {
      name: arrays[name][turn, here]
      for name in ("old", "reference", "values")
      if name in arrays
    }
    if "returns" in arrays:
      given["returns"] = arrays["returns"][here]
    return batch.replace(
      advantage=arrays["advantage"][here],
      loss_mask=batch.loss_mask & counts,
      **given,
    )

  def _lines(
    self,
    asked: Sequence[Problem],
    whole: Part,
    batch: Rollouts,
    earned: Sequence[Earned],
  ) -> list[dict[str, Any]]:
    lines = []
    for i, (problem, one) in enumerate(zip(asked, earned, strict=True)):
      region = batch.region[i]
      lines.append({
        "prompt": problem.prompt,
        "completion": self._completion(whole.tokens[i], whole.given[i]),
        "reward": one.total,
        "rewards": one.parts,
        "failures": one.failures,
        "advantage": float(self._arrays["advantage"][i][region][0]),
        "tokens": whole.tokens[i][region].tolist(),
        "revealed_at": whole.revealed_at[i][region].tolist(),
        "log_prob": float(whole.log_prob[i][region].sum()),
        "calls": int(whole.calls[i]),
      })
    return lines


def _joined(parts: Sequence[Part]) -> Part:
  fields = zip(*(part[:-1] for part in parts), strict=True)
  return Part(*map(np.concatenate, fields), 0.0)


def _figures(
  whole: Part,
  batch: Rollouts,
  earned: Sequence[Earned],
  lines: Sequence[Mapping[str, Any]],
) -> dict[str, float]:
  """Returns what is told of an iteration's rollouts."""
  drawn = batch.region & (whole.revealed_at >= 0)
  tokens = batch.loss_mask.sum(axis=1)
  found = {
    "reward": float(np.mean([one.total for one in earned])),
    "reward_std": float(np.std([one.total for one in earned])),
    "answer_tokens": float(tokens.mean()),
    "calls_per_token": float(whole.calls.sum() / max(tokens.sum(), 1)),
    "entropy": float(-whole.log_prob[drawn].mean()) if drawn.any() else 0.0,
    "failures": float(sum(len(one.failures) for one in earned)),
  }
  for name in earned[0].parts:
    values = [one.parts[name] or 0.0 for one in earned]
    found[f"reward_{name}"] = float(np.mean(values))
  return found

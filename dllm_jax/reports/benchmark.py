"""Measuring the train step and the sampler, compilation apart.

Two programs are compared in alternating rounds of one process, and medians of at
least five rounds are reported: on a shared machine a ratio is worth more than a
time.
"""

import dataclasses
import tempfile
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from dllm_jax.core.paths import Path
from dllm_jax.core.progress import progress_bar
from dllm_jax.parallel import compilation
from dllm_jax.run import timing
from dllm_jax.run.run import Run
from dllm_jax.sampling import requests as requests
from dllm_jax.sampling.generator import Sampled
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.training.loop import Hooks


def train(
  resolved: ConfigDict, *, steps: int = 20, rounds: int = 5
) -> dict[str, Any]:
  """Returns the speed of the train step and the cost of the loop around it.

  Args:
    resolved: a configuration; its text is read.
    steps: steps in a round.
    rounds: rounds of each of the two programs: the compiled step alone on one
      batch, and the whole loop (data, transfer, logging).

  Returns:
    `tokens_per_second` and `step_milliseconds` of the loop (medians),
    `bare_step_milliseconds` of the step alone, `outside_step` (the median over
    rounds of loop time / step time - 1), `mfu` (None where the device's peak is
    not known), `model_flops_per_step`, `compile_seconds`, `peak_bytes`, `device`.
  """
  resolved = ConfigDict(resolved.to_dict())
  resolved.training.steps = steps + 1  # the first step of a round is not timed
  resolved.logging.progress = False
  resolved.checkpoint.every_steps = 10**9
  with tempfile.TemporaryDirectory() as directory:
    run = Run.create(resolved, Path(directory) / "run")
    with jax.set_mesh(run.mesh):
      batch, _, costs = timing.compiled(run)
      state = run.program.init()
      bare, loop = [], []
      for _ in range(rounds + 1):  # the first round warms up
        state, seconds = timing.bare(run.program.step, state, batch, steps)
        bare.append(seconds)
        loop.append(_looped(run, steps))
  bare, loop = np.asarray(bare[1:]), np.asarray(loop[1:])
  return {
    **timing.speeds(run, float(np.median(loop)) / steps),
    "bare_step_milliseconds": 1000 * float(np.median(bare)) / steps,
    "outside_step": float(np.median(loop / bare)) - 1.0,
    **costs,
  }


def _looped(run: Run, steps: int) -> float:
  """Returns the seconds of as many steps of the real loop, the first apart."""
  with tempfile.TemporaryDirectory() as workdir:  # what it saves goes with it
    _, summary = run.loop(Path(workdir), Hooks()).run()
  return steps * timing.tokens(run) / summary["tokens_per_second"]


AGAINST = ("uncached", "equal", "weights")


def sample(
  run: Run,
  sampler: SamplerConfig,
  *,
  batch_size: int = 8,
  rounds: int = 5,
  prompt_tokens: int | None = None,
  ragged: bool = False,
  against: Literal["uncached", "equal", "weights"] | None = None,
) -> dict[str, Any]:
  """Returns the speed of the sampler, warm.

  Args:
    run: whose network; an untrained one is as fast as a trained one.
    sampler: how to sample.
    batch_size: rows sampled together.
    rounds: timed rounds; the median counts.
    prompt_tokens: random tokens before what is sampled; None for a third of the
      canvas.
    ragged: whether prompts have lengths from half of that to all of it, each
      row with as many new tokens.
    against: what runs in alternation: the same without a cache, ragged rows'
      program on rows of equal length, or one reading of all weights.

  Returns:
    `tokens_per_second`, `step_milliseconds` (of a network call),
    `function_evaluations` (the most of a row), `dispatch_milliseconds` (the
    host's share of a generation: until the one program is under way),
    `programs` (that were compiled for it all), `compile_seconds`, `batch_size`,
    `new_tokens`, `device`.
    With `against` also `against` and `ratio`, the median over rounds of the
    two's tokens per second, and `against_tokens_per_second`; for "weights"
    `cached_step_milliseconds` (a network call that refreshes nothing),
    `weight_read_milliseconds`, `weight_bytes` and the `ratio` of the two times.

  Raises:
    ValueError: the prompt leaves nothing to sample, or there is nothing of that
      kind to compare with.
  """
  length = run.config.data.length
  rows = prompts(run, length, batch_size, prompt_tokens, ragged)
  other = {"rows": rows, "sampler": sampler}
  if against == "equal":
    if not ragged:
      raise ValueError(
        "rows of equal length are what ragged ones are compared with: give "
        "--ragged, or another --against"
      )
    other["rows"] = prompts(run, length, batch_size, prompt_tokens, False)
  elif against is not None:
    other["sampler"] = _other(run, sampler, against)

  def once(seed, rows=rows, sampler=sampler):
    return run.sample_rows(rows, length=length, sampler=sampler, seed=seed)

  programs = lambda: sum(each.programs() for each in run.generator.launchers)
  compiled = programs()
  first, timed, others = once(0), [], []
  before = against and once(0, **other)
  with progress_bar(rounds, "round") as bar:
    for seed in range(1, rounds + 1):
      timed.append(once(seed))
      if against is not None:
        others.append(once(seed, **other))
      bar.update()
  seconds = np.array([sampled.seconds for sampled in timed])
  result = _speed(first, timed) | {
    "programs": programs() - compiled,
    "batch_size": batch_size,
    "device": f"{run.mesh.size} x {run.mesh.devices.flat[0].device_kind}",
  }
  if against is None:
    return result
  result["against"] = against
  slower = np.array([sampled.seconds for sampled in others])
  if against == "weights":
    fewer = result["function_evaluations"] - _calls(before)
    step = float(np.median((seconds - slower) / fewer))
    return result | _beside_weights(run, step, rounds)
  ratio = (slower / before.new_tokens) / (seconds / first.new_tokens)
  return result | {
    "against_tokens_per_second": before.new_tokens / float(np.median(slower)),
    "ratio": float(np.median(ratio)),
  }


def _calls(sampled: Sampled) -> int:
  return int(sampled.generation.function_evaluations.max())


def _speed(first: Sampled, timed: list[Sampled]) -> dict[str, Any]:
  """Returns the figures of one sampler, the medians of its timed rounds."""
  seconds = float(np.median([sampled.seconds for sampled in timed]))
  dispatched = [sampled.dispatch_seconds for sampled in timed]
  return {
    "tokens_per_second": first.new_tokens / seconds,
    "step_milliseconds": 1000 * seconds / _calls(first),
    "function_evaluations": _calls(first),
    "dispatch_milliseconds": 1000 * float(np.median(dispatched)),
    "compile_seconds": first.compile_seconds,
    "new_tokens": first.new_tokens,
  }


def _other(run: Run, sampler: SamplerConfig, against: str) -> SamplerConfig:
  """Returns the sampler that another one is compared with."""
  if against not in AGAINST:
    raise ValueError(
      f"unknown --against {against!r}; legal: {', '.join(AGAINST)}"
    )
  spec = sampler.build(run.objective, length=run.config.data.length)
  if spec.cache == "none":
    raise ValueError(
      f"--against={against} measures a cache: give --sampler.cache=dual, or "
      "another one that fits the network"
    )
  if against == "uncached":
    return dataclasses.replace(sampler, cache="none")
  if spec.steps < 2:
    raise ValueError(
      "--against=weights needs at least 2 steps a block, of which it takes half "
      "away to time the rest: set sampler.steps"
    )
  return dataclasses.replace(sampler, steps=spec.steps // 2)


def _beside_weights(run: Run, step: float, rounds: int) -> dict[str, Any]:
  """Returns the seconds of a network call beside those of reading all weights."""
  params = run.state.params["model"]
  sums = lambda params: [jnp.sum(x, dtype=jnp.float32) for x in leaves(params)]
  leaves = jax.tree.leaves
  with jax.set_mesh(run.mesh):
    read = compilation.jit(sums, mesh=run.mesh)
    jax.block_until_ready(read(params))
    seconds, calls = [], 10
    for _ in range(rounds):
      start = time.perf_counter()
      for _ in range(calls):
        total = read(params)
      jax.block_until_ready(total)
      seconds.append((time.perf_counter() - start) / calls)
  once = float(np.median(seconds))
  return {
    "cached_step_milliseconds": 1000 * step,
    "weight_read_milliseconds": 1000 * once,
    "weight_bytes": sum(x.nbytes for x in leaves(params)),
    "ratio": step / once,
  }


def prompts(run, length, batch_size, prompt_tokens, ragged):
  """Returns templates with random prompts; arguments as of `sample`."""
  prompt = length // 3 if prompt_tokens is None else prompt_tokens
  if not 0 <= prompt < length:
    raise ValueError(
      f"prompt_tokens must lie in [0, {length}), less than the canvas, not "
      f"{prompt}"
    )
  rng = np.random.default_rng(0)
  legal = np.arange(run.objective.vocab_size)
  legal = legal[legal != run.objective.mask_id]
  rows = []
  for _ in range(batch_size):
    size = int(rng.integers(prompt // 2, prompt + 1)) if ragged else prompt
    given = rng.choice(legal, size).tolist()
    rows.append([*given, *[None] * (length - prompt)])
  before = lambda row: len(requests.begun(row, run.objective)) - len(row)
  return [row[: length - before(row)] for row in rows]

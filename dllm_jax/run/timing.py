"""How long train steps take: of a run, and of one that is not begun yet."""

from collections.abc import Sequence
import os
import tempfile
import time
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from dllm_jax import data
from dllm_jax.core.paths import Path
from dllm_jax.core.types import Batch
from dllm_jax.parallel import global_batch
from dllm_jax.parallel.hardware import peak_flops
from dllm_jax.run import workdir as workdirs
from dllm_jax.run.run import Run


def program_bytes(compiled: jax.stages.Compiled) -> int:
  """Returns a device's peak memory of a compiled program, by XLA's analysis."""
  memory = compiled.memory_analysis()
  return int(
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    + memory.temp_size_in_bytes
    - memory.alias_size_in_bytes
  )


def step(run: Run, *, steps: int = 5, rounds: int = 5) -> dict[str, Any]:
  """Returns the speed of the compiled train step alone, on one batch.

  Nothing is saved and one state is held, so that what a plan says to fit fits.

  Args:
    run: a run that was created; nothing is written into its directory.
    steps: steps in a round.
    rounds: rounds, of which the median counts.

  Returns:
    `tokens_per_second`, `step_milliseconds` (the median), `mfu`,
    `model_flops_per_step`, `compile_seconds`, `peak_bytes` and `device`.
  """
  with jax.set_mesh(run.mesh):
    batch, program, costs = compiled(run)
    state, found = run.program.init(), []
    for _ in range(rounds + 1):  # the first round warms up
      state, seconds = bare(program, state, batch, steps)
      found.append(seconds)
  return {**speeds(run, float(np.median(found[1:])) / steps), **costs}


def compiled(run: Run):
  """Returns a batch, the compiled step, and what compiling and memory cost."""
  batch = _first_batch(run)
  start = time.perf_counter()
  program = run.program.step.lower(run.program.abstract, batch).compile()
  costs = {
    "compile_seconds": time.perf_counter() - start,
    "peak_bytes": program_bytes(program),
  }
  return batch, program, costs


def speeds(run: Run, seconds: float) -> dict[str, Any]:
  """Returns the figures of a step that takes so many seconds."""
  flops = run.model_flops()
  kind = run.mesh.devices.flat[0].device_kind
  peak = peak_flops(kind)
  return {
    "tokens_per_second": tokens(run) / seconds,
    "step_milliseconds": 1000 * seconds,
    "mfu": peak and flops / seconds / (peak * run.mesh.size),
    "model_flops_per_step": flops,
    "device": f"{run.mesh.size} x {kind}",
  }


def tokens(run: Run) -> int:
  """Returns the tokens of a step."""
  return run.config.training.batch_size * run.config.data.length


def _first_batch(run: Run) -> Batch:
  training = run.config.training
  batches = data.train_iterator(
    run.corpus, batch_size=training.batch_size, seed=training.seed
  )
  return global_batch(next(batches), run.mesh)


def bare(program, state, batch, steps: int):
  """Returns the state and seconds of steps back to back on one batch."""
  state, metrics = program(state, batch)
  jax.block_until_ready(metrics)
  start = time.perf_counter()
  for _ in range(steps):
    state, metrics = program(state, batch)
  jax.block_until_ready((state, metrics))
  return state, time.perf_counter() - start


def opened(
  resolved: ConfigDict,
  directory: str | os.PathLike,
  devices: Sequence[jax.Device] | None = None,
) -> Run:
  """Returns a run that leaves nothing behind but what its corpus makes.

  Args:
    resolved: its configuration.
    directory: for a while.
    devices: what it is trained on; by default all.
  """
  place = Path(directory) / "run"
  corpus = workdirs.load_corpus(place, resolved)
  return Run(place, resolved, corpus.tokenizer, corpus=corpus, devices=devices)


def timed(
  resolved: ConfigDict,
  name: str,
  devices: Sequence[jax.Device] | None = None,
) -> dict[str, Any]:
  """Returns what `step` measures of a configuration's train step.

  Args:
    resolved: the configuration.
    name: what people call it.
    devices: what it is trained on; by default all.

  Returns:
    `seconds` of a step, `compile_seconds`, `peak_bytes` and what is beside them.

  Raises:
    ValueError: a step does not fit into this machine's memory.
  """
  with tempfile.TemporaryDirectory() as directory:
    run = opened(resolved, directory, devices)
    room = _memory(run)
    try:
      found = step(run, steps=2, rounds=2)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      raise ValueError(f"{name} does not fit this device") from error
    if room and found["peak_bytes"] > room:
      raise ValueError(
        f"{name} takes {found['peak_bytes'] / 2**30:.1f} GiB a device, and "
        f"there are {room / 2**30:.1f}: a smaller network, or "
        "training.microbatches"
      )
  return found | {"seconds": found["step_milliseconds"] / 1000}


def _memory(run: Run) -> int:
  """Returns bytes of a device; 0 where nobody tells."""
  device = run.mesh.devices.flat[0]
  stats = device.memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"]
  if device.platform == "cpu":
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  return 0

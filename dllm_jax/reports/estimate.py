"""What training will take, by some steps that are thrown away."""

from collections.abc import Sequence
import os
import tempfile
from typing import Any

import jax
from ml_collections import ConfigDict

from dllm_jax.core.paths import Path
from dllm_jax.reports import benchmark
from dllm_jax.run import workdir as workdirs
from dllm_jax.run.run import Run


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
  """Returns what `benchmark.step` measures of a configuration's train step.

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
      found = benchmark.step(run, steps=2, rounds=2)
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

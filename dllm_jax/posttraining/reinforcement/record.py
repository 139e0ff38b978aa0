"""Rollouts on disk: lines to read, and arrays to go on from.

`rollouts/000007.jsonl` has a line for each rollout of an iteration, with what it
earned. `rollouts/000007.npz` has what updates need of it, old scores included: a
run that is resumed in its middle cannot make them again, as the parameters that
sampled are gone. Both appear whole.
"""

from collections.abc import Mapping, Sequence
import io
import json
from typing import Any

import numpy as np

from dllm_jax.core.files import write_whole
from dllm_jax.core.paths import Path

_FOLDER = "rollouts"


def write(
  workdir: Path,
  iteration: int,
  lines: Sequence[Mapping[str, Any]],
  arrays: Mapping[str, np.ndarray],
) -> None:
  """Writes an iteration; its arrays last: they say that it is whole."""
  folder = workdir / _FOLDER
  folder.mkdir(parents=True, exist_ok=True)
  text = "".join(json.dumps(line) + "\n" for line in lines)
  write_whole(folder / f"{iteration:06d}.jsonl", text)
  made = io.BytesIO()
  np.savez(made, **arrays)
  write_whole(folder / f"{iteration:06d}.npz", made.getvalue())


def read(workdir: Path, iteration: int) -> dict[str, np.ndarray]:
  """Returns the arrays of an iteration.

  Raises:
    FileNotFoundError: they are not there.
  """
  path = workdir / _FOLDER / f"{iteration:06d}.npz"
  if not path.exists():
    raise FileNotFoundError(
      f"{path}, which this run was in the middle of, is missing: restore it from"
      " a copy of the run"
    )
  with np.load(io.BytesIO(path.read_bytes())) as arrays:
    return dict(arrays)


def forget(workdir: Path, before: int) -> None:
  """Removes the arrays of iterations that no checkpoint is in."""
  for path in (workdir / _FOLDER).glob("*.npz"):
    if int(path.name.split(".")[0]) < before:
      path.unlink(missing_ok=True)


def lines(workdir: Path, iteration: int) -> list[dict[str, Any]]:
  """Returns the rollouts of an iteration."""
  path = workdir / _FOLDER / f"{iteration:06d}.jsonl"
  text = path.read_text(encoding="utf-8")
  return [json.loads(line) for line in text.splitlines()]


def newest(workdir: Path, count: int) -> list[str]:
  """Returns rollouts of the newest iteration, for people; none without one."""
  kept = sorted((workdir / _FOLDER).glob("*.jsonl"))
  if not kept:
    return []
  return shown(lines(workdir, int(kept[-1].name.split(".")[0])))[:count]


def shown(rollouts: Sequence[Mapping[str, Any]]) -> list[str]:
  """Returns rollouts with what they earned, for people."""
  return [
    f"{line['prompt']} -> {line['completion']} ({line['reward']:.3g})"
    for line in rollouts
  ]

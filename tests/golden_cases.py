"""Arrays computed by the original code of each system, for parity tests.

A case is a folder with `config.json` (sizes, seeds, options), `io.npz` and,
where a network is involved, `weights.safetensors`. `DLLM_GOLDEN` names another
root with folders of the same form.
"""

import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

ROOT = pathlib.Path(
  os.environ.get("DLLM_GOLDEN", pathlib.Path(__file__).parent / "golden")
)


class Case(NamedTuple):
  """One case: its options and its arrays."""

  config: dict[str, Any]
  arrays: dict[str, np.ndarray]


def load(name: str) -> Case:
  """Returns a case by the name of its folder."""
  folder = ROOT / name
  with np.load(folder / "io.npz") as arrays:
    arrays = dict(arrays)
  return Case(json.loads((folder / "config.json").read_text()), arrays)


def present(*names: str) -> list[str]:
  """Returns those of some cases that the root has."""
  return [name for name in names if (ROOT / name).is_dir()]


def weights(name: str) -> dict[str, np.ndarray]:
  """Returns a case's parameters under their original names."""
  from safetensors.numpy import load_file

  return load_file(ROOT / name / "weights.safetensors")


def same_draws(found, expected, ratios, *, tie: float = 1e-4) -> None:
  """Checks ids that maximise `ratios`; near-ties may fall either way.

  Args:
    found: our ids.
    expected: the original's ids.
    ratios: what was maximised, with the vocabulary last.
    tie: relative gap of the best two ratios below which ids may differ.
  """
  best = np.sort(ratios, axis=-1)
  clear = best[..., -1] - best[..., -2] > tie * best[..., -1]
  np.testing.assert_array_equal(np.where(clear, found, expected), expected)

r"""Advantages: how much better a rollout is than the others of its prompt.

    A_k = (R_k - b_k) / s

with b the mean of the group, or of the others in it (Dr. GRPO, RLOO):
`leave_one_out` is G / (G - 1) times `mean`.
"""

from typing import Literal

from jaxtyping import Float
import numpy as np

Baseline = Literal["mean", "leave_one_out"]
Scale = Literal["none", "std", "population_std"]

_EPSILON = 1e-4  # of trl: groups in which rewards hardly differ


def advantages(
  rewards: Float[np.ndarray, "N G"],
  *,
  baseline: Baseline = "mean",
  scale: Scale = "none",
) -> Float[np.ndarray, "N G"]:
  """Returns the advantages of groups of rollouts.

  Args:
    rewards: of G rollouts of each of N prompts.
    baseline: what is subtracted.
    scale: what it is divided by: nothing, the group's unbiased deviation plus
      1e-4, or its deviation itself (0 where all are equal).
  """
  rewards = np.asarray(rewards, np.float32)
  size = rewards.shape[1]
  centred = rewards - rewards.mean(axis=1, keepdims=True)
  found = centred
  if baseline == "leave_one_out":
    found = centred * (size / max(size - 1, 1))
  if scale == "std":
    spread = np.sqrt((centred**2).sum(1, keepdims=True) / max(size - 1, 1))
    return found / (spread + np.float32(_EPSILON))
  if scale == "population_std":
    spread = np.sqrt((centred**2).mean(axis=1, keepdims=True))
    return np.where(spread > 0, found / np.where(spread > 0, spread, 1), 0)
  return found


def equal(rewards: Float[np.ndarray, "N G"]) -> np.ndarray:
  """Returns the groups all of whose rewards are equal: they teach nothing."""
  return np.ptp(np.asarray(rewards), axis=1) <= 1e-9

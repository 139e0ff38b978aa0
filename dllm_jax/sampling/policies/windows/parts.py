"""Selections inside a part of the window, which moves as slots are revealed."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool

from dllm_jax.core import check
from dllm_jax.sampling.policies.selection import Selection, Threshold

_FAR = 1e6
"""Of slots outside the part, whose turn comes early where steps are few."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubBlocks(Selection):
  """Reveals by a rule inside the first of a window's parts that has masks.

  Parts of `width` slots are finished from left to right, while the network sees
  the masks of all (Fast-dLLM v2, arXiv:2509.26328).

  Attributes:
    width: slots of a part, a divisor of the window, or the window.
    rule: the selection inside it.
    cached: whether calls read the part alone, and of the others what was kept
      (`speculation.parts`), which is an approximation; else all of the window.
  """

  width: int = 8
  rule: Selection = Threshold()
  cached: bool = False

  def __post_init__(self):
    check.at_least(self, 1, "width")

  @property
  def part(self) -> int | None:
    """Slots of a part, if calls read it alone."""
    return self.width if self.cached else None

  @property
  def paces(self) -> bool:
    """Whether steps may be fewer than slots: no call may need two parts."""
    return not self.cached

  @property
  def threshold(self) -> float | None:
    """The rule's."""
    return self.rule.threshold

  @property
  def entropy(self) -> bool:
    """Whether the rule reads entropies."""
    return self.rule.entropy

  def by(self, rule: Selection) -> "SubBlocks":
    """Returns the same parts, filled by another rule."""
    return dataclasses.replace(self, rule=rule)

  def __call__(self, seen, progress, steps, objective) -> Bool[Array, "B W"]:
    """Returns the slots to reveal."""
    part = jnp.arange(seen.candidates.shape[1]) // self.width
    first = part[jnp.argmax(seen.candidates, axis=1)]
    inside = seen.candidates & (part == first[:, None])
    chosen = self.rule(
      seen.replace(candidates=inside), progress, steps, objective
    )
    ahead = seen.replace(score=jnp.where(inside, seen.score, -_FAR))
    return chosen | ahead.best(seen.due(progress, steps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sliding(Selection):
  """Reveals what is certain in a window that begins at the first mask (WeDLM).

  Of its `width` slots those with H + penalty d < bound, d slots behind the first
  mask, or the one with the least (arXiv:2512.22737).

  Attributes:
    width: slots of the window.
    bound: nats; 0 reveals one slot a call.
    penalty: nats a slot.
  """

  width: int = 16
  bound: float = 0.4
  penalty: float = 0.02
  entropy = True

  def __post_init__(self):
    check.at_least(self, 1, "width")
    check.at_least(self, 0, "bound", "penalty")

  def __call__(self, seen, progress, steps, objective) -> Bool[Array, "B W"]:
    """Returns the slots to reveal."""
    first = jnp.argmax(seen.candidates, axis=1)[:, None]
    behind = jnp.arange(seen.candidates.shape[1]) - first
    near = seen.candidates & (behind < self.width)
    doubt = seen.entropy + self.penalty * behind
    sure = near & (doubt < self.bound)
    count = jnp.sum(sure, axis=1, dtype=jnp.int32)
    ahead = seen.replace(score=-jnp.where(near, doubt, _FAR))
    return ahead.best(jnp.maximum(count, seen.due(progress, steps)))

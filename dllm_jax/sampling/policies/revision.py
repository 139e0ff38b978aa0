"""Revisions: what happens to tokens that already stand in a window.

A revision is called after a step's new tokens are in place and may mask tokens
again or replace them. Its memory goes from step to step with the policy's.
"""

import dataclasses
from typing import NamedTuple

from flax import struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.core import check
from dllm_jax.sampling.policies.selection import rank


@struct.dataclass
class Memory:
  """What a revision remembers of a window.

  Attributes:
    confidence: the probability that each token had when it was drawn.
    edits: calls since the window was full.
    settled: whether the last of them changed nothing.
  """

  confidence: Float[Array, "B W"]
  edits: Int[Array, "B"]
  settled: Bool[Array, "B"]


class Taken(NamedTuple):
  """What a step did before the revision.

  Attributes:
    before: the window at its start.
    z: the window with its new tokens.
    token: what was drawn at every slot.
    sure: the probability of that.
    active: slots that may change.
    step: each row's calls before this one.
    steps: calls for each window.
    maskable: slots that were masked when the window was entered.
    mask_id: the mask token.
  """

  before: Int[Array, "B W"]
  z: Int[Array, "B W"]
  token: Int[Array, "B W"]
  sure: Float[Array, "B W"]
  active: Bool[Array, "B W"]
  step: Int[Array, "B"]
  steps: int
  maskable: Int[Array, "B"]
  mask_id: int


def empty(shape: tuple[int, int]) -> Memory:
  """Returns the memory at a window's start."""
  return Memory(
    confidence=jnp.zeros(shape),
    edits=jnp.zeros(shape[:1], jnp.int32),
    settled=jnp.zeros(shape[:1], bool),
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskPredict:
  """Masks the least sure tokens again, earlier ones included.

  After step i of n, floor(N (n - 1 - i) / n) of N slots are masked, whenever
  their tokens were predicted (arXiv:1904.09324). Goes with a selection that
  reveals everything.
  """

  extra = 0

  def __call__(
    self, taken: Taken, memory: Memory
  ) -> tuple[Int[Array, "B W"], Memory]:
    """Returns the window and the memory after a step."""
    new = (taken.before == taken.mask_id) & (taken.z != taken.mask_id)
    sure = jnp.where(new, taken.sure, memory.confidence)
    left = jnp.maximum(taken.steps - 1 - taken.step, 0)
    count = taken.maskable * left // taken.steps
    order = rank(-sure, taken.active)
    worst = taken.active & (order < count[:, None])
    z = jnp.where(worst, taken.mask_id, taken.z)
    return z, memory.replace(confidence=sure)

  def done(self, memory: Memory, full: Bool[Array, "B"]) -> Bool[Array, "B"]:
    """Returns no row: the steps decide."""
    return jnp.zeros_like(full)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit:
  """Replaces tokens of which the network has become sure they are others.

  A token of the window is replaced by the drawn one where that has at least the
  threshold's probability (LLaDA2.1); once the window is full, until nothing
  changes or `extra` calls are used.

  Attributes:
    threshold: a probability in [0, 1]; 0 replaces whatever differs, as the
      original's 0 does (diffusers' 0 edits nothing: that is no revision here).
    extra: calls on a full window, at most.
    always: whether tokens are edited while there are masks too, by the call that
      reveals others (LLaDA2.1's joint rule).
  """

  threshold: float = 0.9
  extra: int = 16
  always: bool = False

  def __post_init__(self):
    check.within("the editing threshold", self.threshold, "[0, 1]")
    if self.extra < 0:
      raise ValueError(f"editing takes 0 calls or more, not {self.extra}")
    if not (self.extra or self.always):
      raise ValueError(
        "editing takes 0 calls on a full window, and none before: give extra"
        " calls, set always, or leave the revision out"
      )

  def __call__(
    self, taken: Taken, memory: Memory
  ) -> tuple[Int[Array, "B W"], Memory]:
    """Returns the window and the memory after a step."""
    known = taken.before != taken.mask_id
    full = ~jnp.any(taken.active & ~known, axis=1)
    may = jnp.ones_like(full) if self.always else full
    change = taken.active & known & may[:, None]
    change &= (taken.token != taken.before) & (taken.sure >= self.threshold)
    memory = memory.replace(
      edits=memory.edits + full,
      settled=full & ~jnp.any(change, axis=1),
    )
    return jnp.where(change, taken.token, taken.z), memory

  def done(self, memory: Memory, full: Bool[Array, "B"]) -> Bool[Array, "B"]:
    """Returns rows that are full and settled, or out of calls."""
    return full & (memory.settled | (memory.edits >= self.extra))


Revision = MaskPredict | Edit

"""Attention masks as small specs: who may attend to whom, by slot.

A spec is a frozen dataclass that compares slot numbers; it is turned into an
array late (`materialise`), or handed to a kernel that skips empty tiles. True
means "may attend". No parameters and no attention arithmetic here.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from dllm_jax.core import check


@dataclasses.dataclass(frozen=True)
class Full:
  """Every slot attends to every slot.

  1 1 1
  1 1 1
  1 1 1
  """

  def allowed(self, q: Int[Array, "*n"], k: Int[Array, "*n"]):
    """Returns True where the query slot may see the key slot."""
    return jnp.ones(jnp.broadcast_shapes(q.shape, k.shape), bool)


@dataclasses.dataclass(frozen=True)
class Causal:
  """A slot attends to itself and to earlier ones.

  1 0 0
  1 1 0
  1 1 1
  """

  def allowed(self, q: Int[Array, "*n"], k: Int[Array, "*n"]):
    """Returns True where the query slot may see the key slot."""
    return q >= k


@dataclasses.dataclass(frozen=True)
class Sliding:
  """A slot attends to itself and to the `window - 1` slots before it.

  With window 2:

      1 0 0
      1 1 0
      0 1 1

  Attributes:
    window: slots that a query sees, its own among them.
  """

  window: int

  def __post_init__(self):
    check.at_least(self, 1, "window")

  def allowed(self, q: Int[Array, "*n"], k: Int[Array, "*n"]):
    """Returns True where the query slot may see the key slot."""
    return (q >= k) & (q - k < self.window)


@dataclasses.dataclass(frozen=True)
class BlockCausal:
  """A slot attends to its own block and to earlier blocks.

  With block 2:

      1 1 0 0
      1 1 0 0
      1 1 1 1
      1 1 1 1

  Attributes:
    block: slots in a block.
  """

  block: int

  def __post_init__(self):
    check.at_least(self, 1, "block")

  def allowed(self, q: Int[Array, "*n"], k: Int[Array, "*n"]):
    """Returns True where the query slot may see the key slot."""
    return q // self.block >= k // self.block


@dataclasses.dataclass(frozen=True)
class TwoStream:
  """The mask of block diffusion training on [z ; x0] (arXiv:2503.09573, eq. 6).

  With block b of a slot modulo `length`, a noisy slot sees its own noisy block
  and earlier clean blocks; a clean slot sees clean blocks up to its own.
  Length 2, block 1:

      z   1 0 0 0
      z   0 1 1 0
      x0  0 0 1 0
      x0  0 0 1 1

  Attributes:
    length: slots in one stream (L); the network sees 2L.
    block: slots in a block, a divisor of length.
    clean_block: slots of a block of the clean stream, where they are others: 1
      reads it causally. None for `block`.
  """

  length: int
  block: int
  clean_block: int | None = None

  def __post_init__(self):
    if self.block < 1 or self.length % self.block:
      raise ValueError(
        f"block {self.block} must divide the length {self.length}"
      )

  def allowed(self, q: Int[Array, "*n"], k: Int[Array, "*n"]):
    """Returns True where the query slot may see the key slot."""
    q_clean, k_clean = q >= self.length, k >= self.length
    q_block = (q % self.length) // self.block
    k_block = (k % self.length) // self.block
    own = (q_block == k_block) & ~q_clean & ~k_clean
    past = (q_block > k_block) & ~q_clean & k_clean
    size = self.clean_block or self.block
    earlier = q % self.length // size >= k % self.length // size
    clean = earlier & q_clean & k_clean
    return own | past | clean


MaskSpec = Full | Causal | Sliding | BlockCausal | TwoStream


def materialise(
  spec: MaskSpec,
  q_slots: Int[Array, "B T"] | Int[Array, "T"],
  k_slots: Int[Array, "S"],
  *,
  q_segments: Int[Array, "B T"],
  k_segments: Int[Array, "B S"],
  extra: Bool[Array, "*B T S"] | None = None,
) -> Bool[Array, "B T S"]:
  """Returns the mask of a spec, segments and an extra mask together.

  A query of segment 0 (padding) sees itself-like padding only, so that its
  softmax stays finite; no other query sees a padded key.

  Args:
    spec: the rule by slot.
    q_slots: the slot of each query, the same for all rows or per row.
    k_slots: the slot of each key.
    q_segments: the segment of each query.
    k_segments: the segment of each key; 0 hides it.
    extra: a further mask, or None.
  """
  mask = spec.allowed(q_slots[..., :, None], k_slots[None, :])
  mask = jnp.broadcast_to(mask, q_segments.shape + k_segments.shape[-1:])
  mask &= q_segments[:, :, None] == k_segments[:, None, :]
  return mask if extra is None else mask & extra


def decided_first(masked: Bool[Array, "B T"]) -> Bool[Array, "B T T"]:
  """Returns a causal mask in the order of decided tokens, then masks.

  Who sees whom is all that an order means to attention where positions are told
  by rotation: nothing has to be moved. With m for a mask, slots 1 m 3 m:

      1   1 0 0 0
      m   1 1 1 0
      3   1 0 1 0
      m   1 1 1 1
  """
  q, k = masked[:, :, None], masked[:, None, :]
  slots = jnp.arange(masked.shape[1])
  causal = slots[:, None] >= slots
  return jnp.where(k, q & causal, q | causal)

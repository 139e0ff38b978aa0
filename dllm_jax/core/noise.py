"""Randomness of samplers: exact categorical draws from position keys.

A draw is a function of (seed, request, the row's own step, position, tag) and of
nothing else, so that a request gets the same tokens alone and in any batch.
`Keyed` is what production uses; `Recorded` replays arrays that another
implementation drew.
"""

import enum
import math

from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt32

from dllm_jax.core.axes import folded


class Tag(enum.IntEnum):
  """What a draw is for; each kind has its own stream."""

  TOKEN = 0
  TRANSFER = 1
  CONFIDENCE = 2
  REMASK = 3
  PRIOR = 4
  TIME = 5
  RESIDUAL = 6
  PATH = 7


@struct.dataclass
class Keyed:
  """Noise from one key a position.

  Attributes:
    data: raw key data, `[B, T, words]`: an ordinary array, so that chunks and
      windows of it are taken like those of any other.
  """

  data: UInt32[Array, "B T words"]

  @classmethod
  def at(
    cls,
    key: Key[Array, "*B"],
    *,
    request: Int[Array, "B"],
    step: Int[Array, "B"],
    position: Int[Array, "B T"],
  ) -> "Keyed":
    """Returns the noise of each row's step at the given canvas positions.

    Of one key, or of one a row.
    """

    def one_row(key, request, step, position):
      row = jax.random.fold_in(jax.random.fold_in(key, request), step)
      return jax.vmap(lambda i: jax.random.fold_in(row, i))(position)

    axes = (0 if key.ndim else None, 0, 0, 0)
    keys = jax.vmap(one_row, in_axes=axes)(key, request, step, position)
    return cls(data=jax.random.key_data(keys))

  def _bits(self, tag: int, n: int) -> UInt32[Array, "B T n"]:
    def one(key):
      return jax.random.bits(jax.random.fold_in(key, tag), (n,))

    keys = jax.random.wrap_key_data(self.data)
    return jax.vmap(jax.vmap(one))(keys)

  def uniform(self, tag: int, n: int = 1) -> Float[Array, "B T n"]:
    """Returns n uniforms in (0, 1) a position, each a multiple of 2^-24."""
    bits = self._bits(tag, n) >> 9
    # Half a step off zero keeps both ends out: log(u) and log(1 - u) are finite.
    return (bits.astype(jnp.float32) + 0.5) * 2.0**-23

  def categorical(
    self, tag: int, logits: Float[Array, "B T V"]
  ) -> Int[Array, "B T"]:
    """Returns one exact draw a position from softmax(logits)."""
    return inverse_cdf(self._bits(tag, 2), logits)


@struct.dataclass
class Recorded:
  """Noise that was drawn elsewhere, for parity with an original.

  Attributes:
    uniforms: by tag, `[B, T, n]`; those of a categorical draw have n = V.
    epsilon: the constant of the originals' Gumbel rule (1e-10 in MDLM and its
      descendants, 0 in LLaDA).
  """

  uniforms: dict[int, Float[Array, "B T n"]]
  epsilon: float = struct.field(pytree_node=False, default=0.0)

  def uniform(self, tag: int, n: int = 1) -> Float[Array, "B T n"]:
    """Returns the recorded uniforms of a tag."""
    return self.uniforms[tag][..., :n]

  def categorical(
    self, tag: int, logits: Float[Array, "B T V"]
  ) -> Int[Array, "B T"]:
    """Returns argmax(logits - log(eps - log(u + eps))), as the originals do."""
    u = self.uniforms[tag]
    gumbel = -jnp.log(self.epsilon - jnp.log(u + self.epsilon))
    return jnp.argmax(logits + gumbel, axis=-1).astype(jnp.int32)


_UNITS = 2.0**30  # total mass of the integer distribution below


def inverse_cdf(
  bits: UInt32[Array, "*n 2"], logits: Float[Array, "*n V"]
) -> Int[Array, "*n"]:
  r"""Returns draws from softmax(logits) by a two-level inverse CDF in integers.

  The vocabulary is cut into about sqrt(V) groups; the first word of `bits` picks
  a group, the second a token inside it, each by comparing with cumulative sums
  of masses in units of 2^-30. Sums of integers are exact, so a token of
  probability 1e-6 keeps its rate to 0.1 %, where a float32 sum near 1 would be
  6 % off (and a 24-bit Gumbel would never reach far tails: MDLM's defect,
  arXiv:2409.02908). Tokens of zero mass are never drawn.

  Args:
    bits: two random words a draw.
    logits: unnormalised log-probabilities; -inf for impossible tokens.
  """
  _, mass = masses(logits)
  group = _pick(bits[..., 0], jnp.sum(mass, axis=-1))
  inside = jnp.take_along_axis(mass, group[..., None, None], axis=-2)[..., 0, :]
  return group * mass.shape[-1] + _pick(bits[..., 1], inside)


def masses(
  logits: Float[Array, "*n V"],
) -> tuple[Float[Array, "*n"], Float[Array, "*n groups size"]]:
  """Returns the largest logit, and exp(logits - largest) in about sqrt(V) groups.

  Whoever sums it by groups shares that pass over the vocabulary with a draw from
  the same logits: a compiler finds that they are one.
  """
  vocab = logits.shape[-1]
  size = math.isqrt(vocab - 1) + 1 if vocab > 1 else 1
  groups = -(-vocab // size)
  logits = logits.astype(jnp.float32)
  largest = folded(jnp.maximum, logits)
  mass = jnp.exp(logits - largest[..., None])
  pad = [(0, 0)] * (mass.ndim - 1) + [(0, groups * size - vocab)]
  return largest, jnp.pad(mass, pad).reshape(*mass.shape[:-1], groups, size)


def _pick(
  bits: UInt32[Array, "*n"], mass: Float[Array, "*n G"]
) -> Int[Array, "*n"]:
  """Returns the index whose share of the integer mass the word falls into."""
  share = mass / jnp.sum(mass, axis=-1, keepdims=True)
  cumulative = jnp.cumsum((share * _UNITS).astype(jnp.uint32), axis=-1)
  word = _multiply_high(bits, cumulative[..., -1])
  return jnp.sum(cumulative <= word[..., None], axis=-1, dtype=jnp.int32)


def _multiply_high(
  a: UInt32[Array, "*n"], b: UInt32[Array, "*n"]
) -> UInt32[Array, "*n"]:
  """Returns floor(a b / 2^32), exactly: a word in [0, b)."""
  a1, a0, b1, b0 = a >> 16, a & 0xFFFF, b >> 16, b & 0xFFFF
  cross1, cross2 = a1 * b0, a0 * b1
  carry = (cross1 & 0xFFFF) + (cross2 & 0xFFFF) + ((a0 * b0) >> 16)
  return a1 * b1 + (cross1 >> 16) + (cross2 >> 16) + (carry >> 16)

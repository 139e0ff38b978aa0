"""Rotary position embeddings, rotate-half form (arXiv:2104.09864).

Feature pair i turns by position times theta^(-2i / dim). A network that reads
more tokens than it was first trained on slows some pairs down: `SCALINGS`.
"""

import dataclasses
import math
from typing import Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.core.axes import once, platform


class Scaling(Protocol):
  """How the frequencies of a longer context follow from the plain ones."""

  def slow(
    self, frequencies: Float[Array, "half"], *, dim: int, theta: float
  ) -> Float[Array, "half"]:
    """Returns the frequencies, in radians a position."""

  def magnitude(self) -> float:
    """Returns the factor of cosines and sines."""

  def queries(self, positions: Int[Array, "B T"]) -> Array | None:
    """Returns the factor of rotated queries, `[B, T]`, or None for 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unscaled:
  """Frequencies as they are."""

  def slow(self, frequencies, *, dim, theta):
    """Returns the frequencies."""
    return frequencies

  def magnitude(self) -> float:
    """Returns 1."""
    return 1.0

  def queries(self, positions: Int[Array, "B T"]) -> Array | None:
    """Returns None: queries stay as they are."""
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Unscaled):
  """Positions divided by a factor (arXiv:2306.15595).

  Attributes:
    factor: how many times the first context, at least 1.
  """

  factor: float

  def __post_init__(self):
    _check_factor(self.factor)

  def slow(self, frequencies, *, dim, theta):
    """Returns frequencies / factor."""
    return frequencies / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3(Unscaled):
  """LLaMA 3.1's: only waves too long for the first context are slowed down.

  With r = first_length f / (2 pi) turns in the first context,

      s = clip((r - low) / (high - low), 0, 1),   f' = f (s + (1 - s) / factor).

  Attributes:
    factor: how many times slower the longest waves are, at least 1.
    first_length: tokens of the first context.
    low: turns up to which a wave is slowed down by the whole factor.
    high: turns from which it is left alone.
  """

  factor: float
  first_length: int
  low: float = 1.0
  high: float = 4.0

  def __post_init__(self):
    _check_factor(self.factor)
    _check_turns(self.low, self.high)

  def slow(self, frequencies, *, dim, theta):
    """Returns f' above."""
    turns = frequencies * (self.first_length / (2 * math.pi))
    kept = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
    return frequencies * (kept + (1 - kept) / self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn(Unscaled):
  """YaRN (arXiv:2309.00071, eq. 19 to 22), as LLaMA's and Qwen's code has it.

  A pair is slowed down by the share of its index i between the pairs that turn
  `high` and `low` times in the first context,

      i(r) = dim ln(first_length / (2 pi r)) / (2 ln theta),
      s = clip((i - i(high)) / (i(low) - i(high)), 0, 1),
      f' = f (1 - s + s / factor).

  Attributes:
    factor: how many times the first context; below 1, as Nemotron 3B is
      published, slow pairs turn faster.
    first_length: tokens of the first context.
    low: turns up to which a wave is slowed down by the whole factor.
    high: turns from which it is left alone.
    whole: whether i(high) is rounded down and i(low) up.
    scale: factor of cosines and sines; None for 0.1 ln(factor) + 1, at least 1.
    query_growth: beta of the factor of queries, which sharpens attention far
      into a text: 1 + beta ln(1 + floor(position / first_length)), as Ministral 3
      has it; 0 for none.
  """

  factor: float
  first_length: int
  low: float = 1.0
  high: float = 32.0
  whole: bool = True
  scale: float | None = None
  query_growth: float = 0.0

  def __post_init__(self):
    _check_factor(self.factor, above=0)
    _check_turns(self.low, self.high)

  def slow(self, frequencies, *, dim, theta):
    """Returns f' above."""
    index = lambda turns: (
      (dim * math.log(self.first_length / (2 * math.pi * turns)))
      / (2 * math.log(theta))
    )
    first, last = index(self.high), index(self.low)
    if self.whole:
      first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    # Deviates: as the originals, from the paper, where both are one pair.
    last += 0.001 * (first == last)
    slowed = jnp.arange(dim // 2, dtype=jnp.float32)
    slowed = jnp.clip((slowed - first) / (last - first), 0, 1)
    return frequencies * (1 - slowed + slowed / self.factor)

  def magnitude(self) -> float:
    """Returns the factor of cosines and sines."""
    if self.scale is not None:
      return self.scale
    return max(0.1 * math.log(self.factor) + 1.0, 1.0)

  def queries(self, positions: Int[Array, "B T"]) -> Array | None:
    """Returns 1 + beta ln(1 + floor(position / first_length))."""
    if not self.query_growth:
      return None
    lengths = (positions // self.first_length).astype(jnp.float32)
    return 1.0 + self.query_growth * jnp.log1p(lengths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proportional(Unscaled):
  """Only the fastest pairs turn, at the frequencies of a whole head (Gemma 4).

  Those from int(share dim // 2) on stand still. Pairs are features i and
  i + dim / 2: what turns is not the first features of a head.

  Attributes:
    share: of the pairs that turn, in (0, 1].
  """

  share: float

  def __post_init__(self):
    if not 0 < self.share <= 1:
      raise ValueError(
        f"proportional rotary positions turn a share of {self.share} of the"
        " pairs; give one above 0 and at most 1"
      )

  def slow(self, frequencies, *, dim, theta):
    """Returns the frequencies, 0 for pairs that stand still."""
    turning = jnp.arange(dim // 2) < int(self.share * dim // 2)
    return jnp.where(turning, frequencies, 0.0)


SCALINGS = {
  "none": Unscaled,
  "linear": Linear,
  "llama3": Llama3,
  "yarn": Yarn,
  "proportional": Proportional,
}


def _check_factor(factor: float, above: float | None = None) -> None:
  if not (factor >= 1 if above is None else factor > above):
    legal = "at least 1" if above is None else f"above {above}"
    raise ValueError(f"the factor of rotary scaling is {factor}; {legal}")


def _check_turns(low: float, high: float) -> None:
  if not 0 < low < high:
    raise ValueError(
      f"rotary scaling between {low} and {high} turns; give 0 < low < high"
    )


def rotary_tables(
  positions: Int[Array, "B T"],
  *,
  dim: int,
  theta: float,
  scaling: Scaling = Unscaled(),
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
  """Returns float32 cosines and sines of positions times theta^(-2i / dim).

  Args:
    positions: position of each token.
    dim: rotated features of a head, even.
    theta: the longest wavelength is about 2 pi theta positions.
    scaling: how frequencies are changed for a longer context.
  """
  exponent = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
  frequencies = scaling.slow(theta**-exponent, dim=dim, theta=theta)
  angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
  scale = scaling.magnitude()
  return once((jnp.cos(angles) * scale, jnp.sin(angles) * scale))


def rotate(
  x: Float[Array, "B T H K"],
  tables: tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]],
) -> Float[Array, "B T H K"]:
  """Returns x with its first 2 half features rotated, in float32 inside.

  Feature i is paired with feature i + half; features past 2 half stay.
  """
  cos, sin = tables
  half = cos.shape[-1]
  turned, rest = jnp.split(x, (2 * half,), axis=-1)
  rotated = _by_pairs if platform() == "cpu" else _by_halves
  turned = rotated(turned.astype(jnp.float32), cos, sin).astype(x.dtype)
  return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def _by_halves(x, cos, sin):
  a, b = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _by_pairs(x, cos, sin):
  """Returns the same without joining halves, for which a CPU's loops branch."""
  pairs = x.reshape(*x.shape[:-1], 2, -1)
  sin = jnp.stack([-sin, sin], axis=-2)
  return (pairs * cos[..., None, :] + jnp.flip(pairs, -2) * sin).reshape(
    x.shape
  )

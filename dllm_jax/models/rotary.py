"""Rotary position embeddings, rotate-half form (arXiv:2104.09864)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rotary_tables(
  positions: Int[Array, "B T"], *, dim: int, theta: float
) -> tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]:
  """Returns float32 cosines and sines of positions times theta^(-2i / dim).

  Args:
    positions: position of each token.
    dim: rotated features of a head, even.
    theta: the longest wavelength is about 2 pi theta positions.
  """
  exponent = jnp.arange(0, dim, 2, dtype=jnp.float32) / dim
  angles = positions[:, :, None, None].astype(jnp.float32) * theta**-exponent
  return jnp.cos(angles), jnp.sin(angles)


def rotate(
  x: Float[Array, "B T H K"],
  tables: tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]],
) -> Float[Array, "B T H K"]:
  """Returns x with its first 2 half features rotated, in float32 inside.

  Feature i is paired with feature i + half; features past 2 half stay.
  """
  cos, sin = tables
  half = cos.shape[-1]
  a, b, rest = jnp.split(x, (half, 2 * half), axis=-1)
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  parts = [y.astype(x.dtype) for y in (a * cos - b * sin, b * cos + a * sin)]
  return jnp.concatenate(parts + [rest] * (rest.shape[-1] > 0), axis=-1)

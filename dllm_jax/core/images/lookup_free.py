r"""Lookup-free quantisation: a vector's signs are its code (arXiv:2310.05737).

A feature z of C channels becomes the C signs of its channels, read as a number
of C bits, the first channel the most significant:

    bit_c = [z_c > 0],  code_c = 2 bit_c - 1,  id = sum_c bit_c 2^(C - 1 - c)

There is no table: 2^C codes need no parameter. Pure functions of features whose
last axis has the channels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Terms(NamedTuple):
  """The two terms of a quantiser's loss.

  Attributes:
    commitment: mean (sg(code) - z)^2 + beta mean (q - sg(z))^2, where q is the
      straight-through sum: what reaches z is (1 - beta) of the first.
    entropy: mean H(p) - mean_c H(mean p), bits p = sigmoid(4 z), nats: low where
      each bit is sure and all are used.
  """

  commitment: Float[Array, ""]
  entropy: Float[Array, ""]


def code(z: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
  """Returns the code of features, 1 where z > 0 and -1 elsewhere (0, NaN)."""
  return jnp.where(z > 0, 1.0, -1.0).astype(z.dtype)


def straight_through(z: Float[Array, "*n C"]) -> Float[Array, "*n C"]:
  """Returns z + sg(code - z): the code, with the gradient of z."""
  return z + jax.lax.stop_gradient(code(z) - z)


def ids(z: Float[Array, "*n C"]) -> Int[Array, "*n"]:
  """Returns the number of each feature's code."""
  bits = z.shape[-1]
  weights = 2 ** jnp.arange(bits - 1, -1, -1, dtype=jnp.int32)
  return jnp.sum(jnp.where(z > 0, weights, 0), axis=-1, dtype=jnp.int32)


def code_of(number: Int[Array, "*n"], bits: int) -> Float[Array, "*n C"]:
  """Returns the code of a number, whose bits are its signs.

  Numbers outside [0, 2^bits) are taken for the nearest inside.
  """
  number = jnp.clip(number, 0, 2**bits - 1)
  shifts = jnp.arange(bits - 1, -1, -1, dtype=number.dtype)
  return 2.0 * ((number[..., None] >> shifts) & 1) - 1.0


def terms(z: Float[Array, "*n C"], *, beta: float = 0.25) -> Terms:
  """Returns the terms of the loss that keeps features at codes, and all in use.

  Args:
    z: features.
    beta: the share of the straight-through term.
  """
  stop = jax.lax.stop_gradient
  kept = jnp.mean((stop(code(z)) - z) ** 2)
  kept += beta * jnp.mean((straight_through(z) - stop(z)) ** 2)
  p = jax.nn.sigmoid(4.0 * z)
  over = tuple(range(z.ndim - 1))
  even = jnp.mean(p, axis=over)
  return Terms(kept, jnp.mean(_entropy(p)) - jnp.mean(_entropy(even)))


def _entropy(p):
  """Returns the entropy of bits, nats; gradients are finite at 0 and 1."""
  log = lambda x: jnp.log(jnp.maximum(x, 1e-20))
  return -(p * log(p) + (1.0 - p) * log(1.0 - p))

r"""Rounding to bfloat16 that is right on average.

A float32 x lies between two neighbours in bfloat16, lo <= |x| < hi, that differ
in the lower 16 bits of their float32 patterns. With r those bits of x as a
fraction, (|x| - lo) / (hi - lo) = r: taking hi with probability r gives

    E[round(x)] = lo (1 - r) + hi r = x,

so that updates far smaller than the gap between neighbours count on average,
where rounding to the nearest loses them all (arXiv:1502.02551, sec. 3;
arXiv:2010.06192 for weights in bfloat16).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

_LOW_BITS = 16


def widened(tree: PyTree) -> PyTree:
  """Returns a tree whose bfloat16 arrays are float32."""
  return jax.tree.map(
    lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree
  )


def stochastic(
  key: Key[Array, ""], x: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
  """Returns float32 numbers in bfloat16, each one of its two neighbours.

  Numbers that bfloat16 has stay as they are, and so does what is not finite.
  """
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
  kept = (bits >> _LOW_BITS).astype(jnp.uint16)
  rounded = jax.lax.bitcast_convert_type(kept, jnp.bfloat16)
  return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def stochastic_tree(key: Key[Array, ""], tree: PyTree, like: PyTree) -> PyTree:
  """Returns a tree in the types of another: float32 rounded by `stochastic`."""
  leaves, shape = jax.tree.flatten(tree)
  types = [leaf.dtype for leaf in jax.tree.leaves(like)]
  return jax.tree.unflatten(
    shape,
    [
      x if x.dtype == kind else stochastic(jax.random.fold_in(key, i), x)
      for i, (x, kind) in enumerate(zip(leaves, types, strict=True))
    ],
  )

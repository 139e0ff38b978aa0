"""Low-discrepancy training times, drawn for the whole global batch at once.

Two different rules are both called "antithetic" in the literature; here each
has its own name. Neither rescales: the objective maps (0, 1) to its interval.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

TimeRule = Literal["independent", "stratified", "shared_offset"]


def draw_times(
  key: Key[Array, ""], shape: tuple[int, ...], rule: TimeRule
) -> Float[Array, "*shape"]:
  r"""Returns times in [0, 1), one for each entry of shape.

  With n entries in row-major order and i the index of one,
  "independent" is u_i; "stratified" is (u_i + i) / n mod 1, an own uniform in
  each stratum (MDLM, UDLM, BD3-LM); "shared_offset" is u + i / n mod 1 with one
  u (MD4). The last two use the global batch, so that the split over devices
  changes nothing.

  Raises:
    ValueError: the rule is unknown.
  """
  n = 1
  for size in shape:
    n *= size
  stratum = jnp.arange(n, dtype=jnp.float32)
  if rule == "independent":
    t = jax.random.uniform(key, (n,))
  elif rule == "stratified":
    t = (jax.random.uniform(key, (n,)) + stratum) / n
  elif rule == "shared_offset":
    t = jax.random.uniform(key, ()) + stratum / n
  else:
    raise ValueError(
      f"unknown time rule {rule!r}; legal: independent, stratified, "
      "shared_offset"
    )
  return (t % 1.0).reshape(shape)

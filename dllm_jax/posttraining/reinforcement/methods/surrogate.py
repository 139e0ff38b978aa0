r"""What methods have in common: clipped ratios and estimators of a divergence.

    S(r) = min(r A, clip(r, 1 - low, 1 + high) A),   r = exp(score - old)

(arXiv:1707.06347, eq. 7). Of d = score - reference, `k1` is d, `k2` d^2 / 2 and
`k3` exp(-d) + d - 1.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

Divergence = Literal["k1", "k2", "k3"]


def clipped(
  gain: Float[Array, "*n"],
  advantage: Float[Array, "*n"],
  *,
  low: float,
  high: float,
  cap: float | None = None,
) -> tuple[Float[Array, "*n"], Bool[Array, "*n"]]:
  """Returns S, and where the clipped side is the smaller one.

  Args:
    gain: score - old, nats.
    advantage: A.
    low: the ratio is clipped at 1 - low,
    high: and at 1 + high.
    cap: the most that the unclipped ratio counts, or None.
  """
  ratio = jnp.exp(gain)
  free = ratio if cap is None else jnp.minimum(ratio, cap)
  free = free * advantage
  held = jnp.clip(ratio, 1.0 - low, 1.0 + high) * advantage
  return jnp.minimum(free, held), ratio * advantage > held


def divergence(
  kind: Divergence,
  score: Float[Array, "*n"],
  reference: Float[Array, "*n"],
) -> Float[Array, "*n"]:
  """Returns an estimate of KL(policy || reference) on samples of the policy."""
  d = score - reference
  if kind == "k1":
    return d
  if kind == "k2":
    return 0.5 * d**2
  return jnp.exp(-d) + d - 1.0


def before(
  score: Float[Array, "*n"], old: Float[Array, "*n"] | None
) -> Float[Array, "*n"]:
  """Returns the old scores; the new ones, without a gradient, for None."""
  return jax.lax.stop_gradient(score if old is None else old)


def mean(values: Array, where: Bool[Array, "*n"]) -> Float[Array, ""]:
  """Returns the mean of some values, 0 of none, without a gradient."""
  values = jax.lax.stop_gradient(values).astype(jnp.float32)
  count = jnp.maximum(jnp.sum(where), 1)
  return jnp.sum(jnp.where(where, values, 0.0)) / count

"""Gaussian diffusion in T steps: how much is kept, and the law of one step.

Nothing here knows tokens or networks. Tables have an entry for each step
n = 0 ... T, 0 being clean: `kept` a_n and `lost` 1 - a_n, made in float64.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from dllm_jax.core.noise import Tag
from dllm_jax.core.types import Noise

Spread = Literal["sqrt", "cosine", "linear"]
Tables = Mapping[str, Float[Array, "T+1"]]


def betas(schedule: Spread, steps: int) -> np.ndarray:
  """Returns beta of each step, `[T]`: "sqrt" has a = 1 - sqrt(n / T + 1e-4)."""
  if schedule == "linear":
    return np.linspace(0.1, 20.0, steps) / steps
  t = np.arange(steps + 1) / steps
  if schedule == "sqrt":
    kept = 1.0 - np.sqrt(t + 1e-4)
  else:
    kept = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
  return np.minimum(1.0 - kept[1:] / kept[:-1], 0.999)


def tables(schedule: Spread, steps: int) -> Tables:
  """Returns `kept` and `lost` of every step."""
  products = np.cumprod(1.0 - betas(schedule, steps))
  kept = np.concatenate([[1.0], products])
  return {
    "kept": jnp.asarray(kept, jnp.float32),
    "lost": jnp.asarray(1.0 - kept, jnp.float32),
  }


class Law(NamedTuple):
  """q(z_m | z_n, x): mean `of_x` x + `of_z` z, and two variances.

  Attributes:
    of_x: coefficient of x.
    of_z: coefficient of z_n.
    variance: of q itself; 0 at m = 0.
    large: 1 - a_n / a_m, its upper bound: beta_n between neighbours.
  """

  of_x: Float[Array, "*n"]
  of_z: Float[Array, "*n"]
  variance: Float[Array, "*n"]
  large: Float[Array, "*n"]


def law(table: Tables, n: Int[Array, "*n"], m: Int[Array, "*n"]) -> Law:
  """Returns the law of the step from n to an earlier m."""
  kept_n, lost_n = table["kept"][n], table["lost"][n]
  kept_m, lost_m = table["kept"][m], table["lost"][m]
  large = (lost_n - lost_m) / kept_m
  return Law(
    of_x=large * jnp.sqrt(kept_m) / lost_n,
    of_z=lost_m * jnp.sqrt(kept_n / kept_m) / lost_n,
    variance=large * lost_m / lost_n,
    large=large,
  )


def implicit(
  table: Tables, n: Int[Array, "*n"], m: Int[Array, "*n"], eta: float
) -> Law:
  """Returns DDIM's law (arXiv:2010.02502, eq. 12); eta 0 is deterministic."""
  kept_n, lost_n = table["kept"][n], table["lost"][n]
  kept_m, lost_m = table["kept"][m], table["lost"][m]
  large = (lost_n - lost_m) / kept_m
  variance = eta**2 * lost_m / lost_n * large
  rest = jnp.sqrt(jnp.maximum(lost_m - variance, 0.0) / lost_n)
  return Law(
    of_x=jnp.sqrt(kept_m) - rest * jnp.sqrt(kept_n),
    of_z=rest,
    variance=variance,
    large=large,
  )


def divergence(
  one: Law, variance: Float[Array, "*n"], gap: Float[Array, "*n L E"]
) -> Float[Array, "*n L"]:
  """Returns KL(q(z_m | z_n, x) || N(mean of x + gap, variance)), in nats.

  Args:
    one: the law of the step; its own variance above 0.
    variance: the other's.
    gap: by how much the other's x is wrong.
  """
  ratio = jnp.where(one.variance > 0, one.variance / variance, 1.0)
  spread = 0.5 * gap.shape[-1] * (ratio - 1.0 - jnp.log(ratio))
  square = jnp.sum(jnp.square(gap), axis=-1)
  return spread + 0.5 * one.of_x**2 / variance * square


def prior_divergence(
  table: Tables, x: Float[Array, "*n E"]
) -> Float[Array, "*n"]:
  """Returns KL(q(z_T | x) || N(0, I)), in nats."""
  kept, lost = table["kept"][-1], table["lost"][-1]
  terms = kept * jnp.square(x) + lost - 1.0 - jnp.log(lost)
  return 0.5 * jnp.sum(terms, axis=-1)


def normal(noise: Noise, tag: Tag, n: int) -> Float[Array, "B T n"]:
  """Returns n standard normal numbers a position."""
  return jax.scipy.special.ndtri(noise.uniform(tag, n))

r"""D3PM's transitions: those in closed form, and the names of all.

Uniform and absorbing matrices and their mix are three numbers a step
(`mixture.Parts`), so that vocabularies of 50k cost nothing; `d3pm_matrix` has
the others. Each gives `tables`, which become `Process.constants`, and reads them
on chunks of positions: `marginal`, `likelihood`, `neighbour`.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from dllm_jax.core import check
from dllm_jax.objectives.d3pm_matrix import (
  Band,
  Gaussian,
  NearestNeighbour,
  Table,
)
from dllm_jax.objectives.mixture import (
  between,
  likelihood,
  log_marginal,
  Parts,
  parts_divergence,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform:
  """Q = (1 - beta) I + beta 1 1^T / K (app. A.2.1)."""

  closed: ClassVar[bool] = True
  masks: ClassVar[bool] = False

  def mask_share(self) -> float:
    """Returns the part of replaced tokens that are masked."""
    return 0.0

  def check(self, vocab_size: int, steps: int) -> None:
    """Raises ValueError where the vocabulary does not fit: never."""
    del vocab_size, steps

  def cumulative(self, betas: np.ndarray) -> Parts:
    """Returns the fate of a clean token after 0 ... T steps, `[T + 1]`."""
    products = lambda x: np.concatenate([[1.0], np.cumprod(1.0 - x)])
    keep = products(betas)
    mask = 1.0 - products(betas * self.mask_share())
    return Parts(keep, np.maximum(1.0 - keep - mask, 0.0), mask)

  def tables(
    self, betas: np.ndarray, vocab_size: int, mask_id: int | None
  ) -> dict[str, Any]:
    """Returns the arrays of the process: three numbers a step."""
    share = self.mask_share()
    first = lambda x, at_0: jnp.asarray(np.concatenate([[at_0], x]))
    cumulative = Parts(*map(jnp.asarray, self.cumulative(betas)))
    end = Parts(*(x[-1] for x in cumulative))
    start = Parts(jnp.zeros_like(end.keep), end.keep + end.uniform, end.mask)
    return {
      "step": Parts(
        first(1.0 - betas, 1.0),
        first(betas * (1.0 - share), 0.0),
        first(betas * share, 0.0),
      ),
      "cumulative": cumulative,
      "prior_loss": parts_divergence(end, start, vocab_size, mask_id),
    }

  def marginal(
    self,
    tables: dict[str, Any],
    log_p: Float[Array, "B c V"],
    n: Int[Array, "B #c"],
    mask_id: int | None,
  ) -> Float[Array, "B c V"]:
    """Returns q(z_n | x0 ~ p)."""
    return jnp.exp(log_marginal(at(tables["cumulative"], n), log_p, mask_id))

  def likelihood(
    self,
    tables: dict[str, Any],
    z: Int[Array, "B c"],
    n: Int[Array, "B #c"],
    s: Int[Array, "B #c"],
    vocab_size: int,
    mask_id: int | None,
  ) -> Float[Array, "B c V"]:
    """Returns q(z_n = z | z_s = y) for every y."""
    far = between(
      at(tables["cumulative"], s), at(tables["cumulative"], n), absorbing=True
    )
    near = at(tables["step"], n)  # exact for neighbours
    jump = jax.tree.map(lambda a, b: jnp.where(n - s == 1, a, b), near, far)
    return likelihood(jump, z, vocab_size, mask_id, absorbing=True)

  def neighbour(
    self,
    tables: dict[str, Any],
    z: Int[Array, "B c"],
    n: Int[Array, "B #c"],
    vocab_size: int,
    mask_id: int | None,
  ) -> Float[Array, "B c V"]:
    """Returns q(z_n = z | z_{n-1} = y) for every y."""
    jump = at(tables["step"], n)
    return likelihood(jump, z, vocab_size, mask_id, absorbing=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Absorbing(Uniform):
  """Q = (1 - beta) I + beta 1 e_m^T (app. A.2.2)."""

  masks: ClassVar[bool] = True

  def mask_share(self) -> float:
    """Returns the part of replaced tokens that are masked."""
    return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskUniform(Uniform):
  """Replaced tokens are masked or made uniform; masks stay (app. A.2.6).

  Attributes:
    mask_fraction: the part of replaced tokens that are masked.
  """

  mask_fraction: float = 2 / 3

  masks: ClassVar[bool] = True

  def __post_init__(self):
    check.within("mask_fraction", self.mask_fraction, "[0, 1]")

  def mask_share(self) -> float:
    """Returns the part of replaced tokens that are masked."""
    return self.mask_fraction


def at(parts: Parts, n: Int[Array, "*n"]) -> Parts:
  """Returns the fates of step n."""
  return Parts(*(x[n] for x in parts))


Transition = (
  Uniform | Absorbing | MaskUniform | Gaussian | Band | NearestNeighbour | Table
)

TRANSITIONS = {
  "uniform": Uniform,
  "absorbing": Absorbing,
  "mask_uniform": MaskUniform,
  "gaussian": Gaussian,
  "band": Band,
  "nearest_neighbour": NearestNeighbour,
  "table": Table,
}

"""D3PM's transition matrices that are stored whole (arXiv:2107.03006, app. A).

A row of Q_n is the law of z_n given z_{n-1}; the product Q_1 ... Q_n is the law of
z_n given x0, and n = 0 is clean. Tables are computed on the host in float64. For
small vocabularies: they take 2 (T + 1) K^2 numbers.
"""

import abc
import dataclasses
import io
from typing import Any, ClassVar, Literal

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from dllm_jax.core import check, paths

_MAX_ELEMENTS = 2**29  # of a table, 2 GiB in float32
_ROW_TOLERANCE = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Dense(abc.ABC):
  """Matrices stored whole; subclasses give the matrix of one beta."""

  closed: ClassVar[bool] = False
  masks: ClassVar[bool] = False

  @abc.abstractmethod
  def matrix(self, beta: float, size: int) -> np.ndarray:
    """Returns one step, `[K, K]`, rows sum to 1."""

  def matrices(self, betas: np.ndarray, size: int) -> list[np.ndarray]:
    """Returns the matrices of all steps."""
    return [self.matrix(beta, size) for beta in betas]

  def check(self, vocab_size: int, steps: int) -> None:
    """Raises ValueError if the tables do not fit or rows do not sum to 1."""
    if (steps + 1) * vocab_size**2 > _MAX_ELEMENTS:
      raise ValueError(
        f"{steps + 1} matrices of {vocab_size} x {vocab_size} need more than "
        f"{_MAX_ELEMENTS} numbers: take fewer steps, a smaller vocabulary, or "
        "uniform, absorbing or mask_uniform, which have a closed form"
      )
    check_rows(self.matrix(0.5, vocab_size), vocab_size)

  def tables(
    self, betas: np.ndarray, vocab_size: int, mask_id: int | None
  ) -> dict[str, Any]:
    """Returns matrices of each step and their products, `[T + 1, K, K]`."""
    step = [np.eye(vocab_size), *self.matrices(betas, vocab_size)]
    products = [step[0]]
    for one in step[1:]:
      products.append(products[-1] @ one)
    last = np.clip(products[-1], 0.0, None)
    log_ratio = np.log(np.where(last > 0, last * vocab_size, 1.0))
    return {
      "step": jnp.asarray(np.stack(step)),
      "cumulative": jnp.asarray(np.stack(products)),
      "prior_loss": jnp.asarray(np.sum(last * log_ratio, axis=1)),
    }

  def marginal(
    self,
    tables: dict[str, Any],
    log_p: Float[Array, "B c V"],
    n: Int[Array, "B #c"],
    mask_id: int | None,
  ) -> Float[Array, "B c V"]:
    """Returns q(z_n | x0 ~ p)."""
    rows = tables["cumulative"][n]
    p = jnp.exp(log_p)
    if n.shape[1] == 1:
      return jnp.einsum("bcj,bjk->bck", p, rows[:, 0], precision="highest")
    return jnp.einsum("bcj,bcjk->bck", p, rows, precision="highest")

  def likelihood(
    self,
    tables: dict[str, Any],
    z: Int[Array, "B c"],
    n: Int[Array, "B #c"],
    s: Int[Array, "B #c"],
    vocab_size: int,
    mask_id: int | None,
  ) -> Float[Array, "B c V"]:
    """Returns q(z_n = z | z_s = y) for every y: columns of Q_{s+1} ... Q_n."""
    n, s = jnp.broadcast_to(n, z.shape), jnp.broadcast_to(s, z.shape)

    def back(carry):
      i, column = carry
      before = jnp.einsum(
        "jk,bck->bcj", tables["step"][i], column, precision="highest"
      )
      inside = (i <= n) & (i > s)
      return i - 1, jnp.where(inside[..., None], before, column)

    column = jax.nn.one_hot(z, vocab_size, dtype=tables["step"].dtype)
    lowest = jnp.min(s)
    _, column = lax.while_loop(
      lambda carry: carry[0] > lowest, back, (jnp.max(n), column)
    )
    return column

  def neighbour(
    self,
    tables: dict[str, Any],
    z: Int[Array, "B c"],
    n: Int[Array, "B #c"],
    vocab_size: int,
    mask_id: int | None,
  ) -> Float[Array, "B c V"]:
    """Returns q(z_n = z | z_{n-1} = y) for every y."""
    return tables["step"][n, :, z]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kernel(_Dense):
  """Q = (1 - beta) I + beta M for one matrix M."""

  @abc.abstractmethod
  def kernel(self, size: int) -> np.ndarray:
    """Returns M, `[K, K]`."""

  def matrix(self, beta: float, size: int) -> np.ndarray:
    """Returns one step."""
    return self.matrices(np.array([beta]), size)[0]

  def matrices(self, betas: np.ndarray, size: int) -> list[np.ndarray]:
    """Returns the matrices of all steps; M is made once."""
    kernel = self.kernel(size)
    check_rows(kernel, size)
    return [(1 - beta) * np.eye(size) + beta * kernel for beta in betas]


def check_rows(matrix: np.ndarray, vocab_size: int) -> None:
  """Checks that a transition matrix is square and its rows are laws.

  Raises:
    ValueError: it is not K x K, has a negative entry, or a row that does not sum
      to one.
  """
  if matrix.shape != (vocab_size, vocab_size):
    raise ValueError(
      f"a transition matrix over {vocab_size} tokens must be {vocab_size} x "
      f"{vocab_size}, not {' x '.join(map(str, matrix.shape))}"
    )
  if np.min(matrix) < 0:
    row = int(np.argmin(np.min(matrix, axis=1)))
    raise ValueError(
      f"row {row} of the transition matrix has a negative probability "
      f"{np.min(matrix):.6g}"
    )
  sums = matrix.sum(axis=1)
  row = int(np.argmax(np.abs(sums - 1)))
  if abs(sums[row] - 1) > _ROW_TOLERANCE:
    raise ValueError(
      f"row {row} of the transition matrix sums to {sums[row]:.6g}, not 1: "
      "entry (i, j) is the probability of going from i to j"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian(_Dense):
  r"""Discretised Gaussian for ordinal tokens (app. A.2.3).

  q(i -> j) ~ exp(-(x_i - x_j)^2 / beta), normalised over all offsets, and what a
  row lacks at the ends stays on its diagonal; x_i = 2 i span / (K - 1)^2.

  Attributes:
    span: the largest token value before scaling; None for K - 1, which puts x on
      [-1, 1] (the published 256 pixel values).
    bands: offsets beyond this have probability 0; None for all.
  """

  span: float | None = None
  bands: int | None = None

  def matrix(self, beta: float, size: int) -> np.ndarray:
    """Returns one step."""
    bands = min(self.bands or size - 1, size - 1)
    span = size - 1 if self.span is None else self.span
    offsets = np.arange(-bands, bands + 1)
    x = offsets * span / (size - 1) * 2 / (size - 1)
    weights = np.exp(-(x**2) / max(beta, 1e-300))
    weights /= weights.sum()
    result = np.zeros((size, size))
    for k, weight in zip(offsets, weights, strict=True):
      if k:
        result += np.diag(np.full(size - abs(k), weight), k)
    return result + np.diag(1 - result.sum(axis=1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Band(_Dense):
  """Uniform over near tokens, for ordinal ones (app. A.2.4).

  Attributes:
    bands: the farthest offset.
    normalise: "band": beta is spread over the tokens within reach, itself
      included (text code); "vocabulary": each offset gets beta / K (image code).
  """

  bands: int = 2
  normalise: Literal["band", "vocabulary"] = "band"

  def __post_init__(self):
    check.at_least(self, 1, "bands")
    if self.normalise not in ("band", "vocabulary"):
      raise ValueError(
        f"unknown normalise {self.normalise!r}; legal: band, vocabulary"
      )

  def matrix(self, beta: float, size: int) -> np.ndarray:
    """Returns one step."""
    i = np.arange(size)
    near = (abs(i[:, None] - i) <= self.bands).astype(np.float64)
    if self.normalise == "band":
      near /= near.sum(axis=1, keepdims=True)
      return (1 - beta) * np.eye(size) + beta * near
    result = beta / size * (near - np.eye(size))
    return result + np.diag(1 - result.sum(axis=1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class NearestNeighbour(_Kernel):
  """Tokens change into tokens with near embeddings (app. A.2.5).

  M is the symmetric graph of nearest neighbours, scaled to rows and columns that
  sum to one (Sinkhorn); Q = (1 - beta) I + beta M.

  Attributes:
    embeddings: an `.npy` file, `[K, E]`.
    neighbours: nearest tokens that each token points to.
    iterations: of Sinkhorn's scaling.
  """

  embeddings: str
  neighbours: int = 10
  iterations: int = 100

  def __post_init__(self):
    check.at_least(self, 1, "neighbours")
    _check_file(self.embeddings, "embeddings")

  def kernel(self, size: int) -> np.ndarray:
    """Returns the doubly stochastic graph."""
    points = _array(self.embeddings).astype(np.float64)
    if points.ndim != 2 or len(points) != size:
      raise ValueError(
        f"embeddings {self.embeddings} must be [{size}, E], one row for each "
        f"token, not {list(points.shape)}"
      )
    square = np.sum(points**2, axis=1)
    distance = square[:, None] + square - 2 * points @ points.T
    np.fill_diagonal(distance, np.inf)
    near = np.argsort(distance, axis=1)[:, : min(self.neighbours, size - 1)]
    graph = np.zeros((size, size))
    np.put_along_axis(graph, near, 1.0, axis=1)
    graph += graph.T
    for _ in range(self.iterations):
      graph /= graph.sum(axis=0, keepdims=True)
      graph /= graph.sum(axis=1, keepdims=True)
    return graph


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(_Kernel):
  """Any kernel M: Q = (1 - beta) I + beta M.

  Attributes:
    rows: M, `[K][K]`, rows sum to 1; or the name of an `.npy` file of it.
  """

  rows: tuple[tuple[float, ...], ...] | str

  def __post_init__(self):
    if isinstance(self.rows, str):
      _check_file(self.rows, "rows")
    else:
      hashable = tuple(tuple(map(float, row)) for row in self.rows)
      object.__setattr__(self, "rows", hashable)

  def kernel(self, size: int) -> np.ndarray:
    """Returns the given rows."""
    if isinstance(self.rows, str):
      return _array(self.rows)
    return np.array(self.rows)


def _array(name: str) -> np.ndarray:
  return np.load(io.BytesIO(paths.place(name).read_bytes()))


def _check_file(name: str, what: str) -> None:
  if not paths.place(name).is_file():
    raise FileNotFoundError(f"{what}: no file {name}; give an .npy array")

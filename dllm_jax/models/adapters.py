"""Low-rank adapters: what they add to a matrix, and how they are multiplied out.

`LoRA` and `DoRA` are the section `model.adapter` of a configuration. All that they
add to a network is zero at first but A, so that a fresh adapter changes nothing,
whatever weights it is put beside. Names of their parameters begin with "lora_".
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
import re
import types
from typing import Any, Literal

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from dllm_jax.core.axes import AXES, axis_size, once, platform
from dllm_jax.models.quantised import BASES, check_base, dense, product

NAMES = ("lora_a", "lora_b", "lora_magnitude")
"""A and B, and what DoRA adds to the magnitudes."""

_LOW = "lora_low"
"""The name of x A, by which rules of rematerialisation find it."""

_MATRICES = r"(.*/)?layers/(attention|mlp)(/shared)?/(?!router)[a-z]+"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA:
  """W + s A B in place of W, A and B of low rank (arXiv:2106.09685, eq. 3).

  W is frozen. A is normal of deviation 1 / sqrt(fan in), B is zero at first.

  Attributes:
    rank: columns of A and rows of B (r); 0 for no adapters.
    alpha: s = alpha / r, or alpha / sqrt(r).
    targets: a regular expression of the paths of matrices that have adapters,
      such as ".*attention/[qv]"; by default all of attention and perceptrons.
    scaling: "rank" for s = alpha / r, "root" for s = alpha / sqrt(r), which keeps
      what is learned as large at any rank (arXiv:2312.03732, eq. 2).
    base: what the matrices of attention and perceptrons are held in: "default"
      (`param_dtype`), "int8", "int4" or "nf4" (`quantised`, arXiv:2305.14314).
  """

  rank: int = 0
  alpha: float = 16.0
  targets: str = ".*"
  scaling: Literal["rank", "root"] = "rank"
  base: Literal["default", "int8", "int4", "nf4"] = "default"

  def __post_init__(self):
    if self.rank < 0:
      raise ValueError(f"adapter.rank must be at least 0, not {self.rank}")
    for name, legal in (("scaling", ("rank", "root")), ("base", BASES)):
      if getattr(self, name) not in legal:
        raise ValueError(
          f"unknown adapter.{name} {getattr(self, name)!r}; legal: "
          + ", ".join(legal)
        )
    try:
      re.compile(self.targets)
    except re.error as error:
      raise ValueError(
        f"adapter.targets {self.targets!r} is no regular expression ({error})"
      ) from error
    check_base(self.base)
    if self.base != "default" and not self.rank:
      raise ValueError(
        f"adapter.base {self.base!r} freezes the matrices, so that adapters have"
        " to train: set adapter.rank, or leave adapter.base at default"
      )

  @property
  def scale(self) -> float:
    """The factor s of A B."""
    power = 1.0 if self.scaling == "rank" else 0.5
    return self.alpha / self.rank**power

  def on(self, path: str) -> bool:
    """Returns whether the matrix of a path has an adapter."""
    return self.rank > 0 and re.fullmatch(self.targets, path) is not None

  def init(self, fan_in: int, fan_out: int) -> Mapping[str, Any]:
    """Returns an initialiser of each parameter, `key -> array`, by name."""
    deviation = fan_in**-0.5
    return {
      "lora_a": lambda key: (
        jax.random.normal(key, (fan_in, self.rank)) * deviation
      ),
      "lora_b": lambda key: jnp.zeros((self.rank, fan_out)),
    }

  def change(
    self, adapter: Mapping[str, Float[Array, "..."]]
  ) -> Float[Array, "D F"]:
    """Returns s A B in float32."""
    a, b = (adapter[x].astype(jnp.float32) for x in ("lora_a", "lora_b"))
    return self.scale * (a @ b)

  def apply(
    self,
    x: Float[Array, "*n D"],
    y: Float[Array, "*n F"],
    kernel: Float[Array, "D F"],
    adapter: Mapping[str, Float[Array, "..."]],
  ) -> Float[Array, "*n F"]:
    """Returns what the changed matrix makes of x.

    Args:
      x: inputs.
      y: x times the kernel.
      kernel: the frozen matrix.
      adapter: its parameters by name.
    """
    a, b = (adapter[name].astype(x.dtype) for name in ("lora_a", "lora_b"))
    low = product(x, a, "default")
    y += product(low, self.scale * b, "default")
    return self.rescaled(y, kernel, adapter)

  def apply_as_one(
    self,
    x: Float[Array, "*n D"],
    kernel: Any,
    adapter: Mapping[str, Float[Array, "..."]],
  ) -> Float[Array, "*n F"]:
    """Returns what `apply` does, by one product with W + s A B (`one_is_cheaper`).

    Neither pass adds arrays as large as its product. For the backward pass nothing
    but the arguments and x A is kept: sums of matrices are formed again.

    Args:
      x: inputs.
      kernel: the frozen matrix, `[*inputs, *outputs]`, as it is held.
      adapter: its parameters by name.
    """
    flat = lambda kernel: dense(kernel).astype(x.dtype).reshape(x.shape[-1], -1)

    @functools.partial(
      jax.checkpoint,
      prevent_cse=False,
      policy=jax.checkpoint_policies.save_only_these_names(_LOW),
    )
    def run(x, kernel, a, b):
      return _through(x, flat(kernel), a, b)

    a, b = (adapter[name].astype(x.dtype) for name in ("lora_a", "lora_b"))
    y = run(x, kernel, a, self.scale * b)
    return self.rescaled(y, flat(kernel), adapter)

  def rescaled(
    self,
    y: Float[Array, "*n F"],
    kernel: Float[Array, "D F"],
    adapter: Mapping[str, Float[Array, "..."]],
  ) -> Float[Array, "*n F"]:
    """Returns the outputs of a changed matrix, given x (W + s A B)."""
    del kernel, adapter
    return y

  def merged(
    self,
    kernel: Float[Array, "D F"],
    adapter: Mapping[str, Float[Array, "..."]],
  ) -> Float[Array, "D F"]:
    """Returns the matrix that stands for kernel and adapter, in float32."""
    return kernel.astype(jnp.float32) + self.change(adapter)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
  """m (W + s A B) / |W + s A B|, a magnitude and a direction (arXiv:2402.09353).

  Norms are of columns, one an output feature (eq. 5); m is |W| at first. The norm
  of the direction is a constant to the gradient (sec. 4.3). What trains is
  m - |W|, zero at first: its gradient and Adam's steps are those of m.
  """

  def init(self, fan_in: int, fan_out: int) -> Mapping[str, Any]:
    """Returns an initialiser of each parameter by name."""
    return super().init(fan_in, fan_out) | {
      "lora_magnitude": lambda key: jnp.zeros((fan_out,))
    }

  def factor(
    self,
    kernel: Float[Array, "D F"],
    adapter: Mapping[str, Float[Array, "..."]],
  ) -> Float[Array, "F"]:
    """Returns m / |W + s A B| in float32, exactly 1 where nothing was learned."""
    wide = kernel.astype(jnp.float32)
    direction = column_norms(wide + self.change(adapter))
    own, direction = lax.stop_gradient((column_norms(wide), direction))
    # A column of zeros has no direction: it stays as it is.
    safe = jnp.where(direction > 0, direction, 1.0)
    magnitude = own + adapter["lora_magnitude"].astype(jnp.float32)
    return jnp.where(direction > 0, magnitude / safe, 1.0)

  def rescaled(
    self,
    y: Float[Array, "*n F"],
    kernel: Float[Array, "D F"],
    adapter: Mapping[str, Float[Array, "..."]],
  ) -> Float[Array, "*n F"]:
    """Returns the outputs of the changed matrix, given x (W + s A B)."""
    return y * self.factor(kernel, adapter).astype(y.dtype)

  def merged(
    self,
    kernel: Float[Array, "D F"],
    adapter: Mapping[str, Float[Array, "..."]],
  ) -> Float[Array, "D F"]:
    """Returns the matrix that stands for kernel and adapter, in float32."""
    return super().merged(kernel, adapter) * self.factor(kernel, adapter)


ADAPTERS: Mapping[str, type] = types.MappingProxyType({
  "lora": LoRA,
  "dora": DoRA,
})


def one_is_cheaper(x: Float[Array, "*n D"], fan_out: int) -> bool:
  """Returns whether x W + s (x A) B is better computed as x (W + s A B).

  For n positions the thin products and their sum touch n (D + F) numbers, the sum
  of matrices D F. It needs products of full float32: a processor of matrices
  rounds factors to fewer bits, and with them what A B changes of W.

  Args:
    x: inputs.
    fan_out: F.
  """
  positions, fan_in = math.prod(x.shape[:-1]), x.shape[-1]
  return (
    x.dtype == jnp.float32
    and platform() == "cpu"
    and axis_size(*AXES) == 1
    and positions * (fan_in + fan_out) >= fan_in * fan_out
  )


@jax.custom_vjp
def _through(x, w, a, b):
  """Returns x (W + A B); gradients of A and B as of x W + (x A) B.

  Thin products cost what they read: x A comes with x (W + A B), the gradient times
  B^T with that of x, as a few more columns. The gradient of W is formed where W
  trains, too, that of x where anything before trains.
  """
  return product(x, w + a @ b, "default")


def _through_forward(x, w, a, b):
  # Of pytrees, both without arrays.
  x_trains, w_trains = (() if y.perturbed else None for y in (x, w))
  x, w, a, b = (y.value for y in (x, w, a, b))
  beside = jnp.concatenate((b, jnp.eye(a.shape[1], dtype=b.dtype)), axis=1)
  y = product(x, _plus(a @ beside, w), "default")
  y, low = jnp.split(y, w.shape[1:], axis=-1)
  return y, (x, w, a, b, checkpoint_name(low, _LOW), x_trains, w_trains)


def _through_backward(saved, gradient):
  x, w, a, b, low, x_trains, w_trains = saved
  if x_trains is None:
    d_x, d_low = None, product(gradient, b.T, "default")
  else:
    # Formed as it is multiplied by: products with transposed ones are slower, and
    # so are sums, that read a column number by number.
    beside = jnp.concatenate((a.T, jnp.eye(b.shape[0], dtype=a.dtype)), axis=1)
    d_x = product(gradient, _plus(b.T @ beside, once(w.T)), "default")
    d_x, d_low = jnp.split(d_x, w.shape[:1], axis=-1)
  rows = lambda y: y.reshape(-1, y.shape[-1])
  # Sums over positions are three times as fast with few rows as with few columns.
  # A barrier keeps the compiler from turning them.
  d_a = lax.optimization_barrier(rows(d_low).T @ rows(x)).T
  d_w = None if w_trains is None else rows(x).T @ rows(gradient)
  return d_x, d_w, d_a, rows(low).T @ rows(gradient)


_through.defvjp(_through_forward, _through_backward, symbolic_zeros=True)


def _plus(wide, w):
  """Returns a matrix with W added to its first rows and columns, in place.

  XLA's loops on CPUs choose number by number in an array that is padded or joined.
  """
  top = lax.slice(wide, (0, 0), w.shape)
  return lax.dynamic_update_slice(wide, top + w, (0, 0))


def column_norms(kernel: Float[Array, "*n D F"]) -> Float[Array, "*n F"]:
  """Returns the norm of each output feature's column, in float32."""
  wide = kernel.astype(jnp.float32)
  return jnp.sqrt(jnp.sum(wide * wide, axis=-2))


def merge_adapters(params: PyTree, config: Any) -> PyTree:
  """Returns parameters without adapters, each matrix with its own multiplied out.

  Matrices in 8 or 4 bits are in the network's type again.

  Args:
    params: the network's parameters, with adapters or without.
    config: the network's config, whose `adapter` is read.
  """
  if not isinstance(params, dict):
    return params
  merged = {
    name: merge_adapters(value, config)
    for name, value in params.items()
    if name not in NAMES
  }
  if "kernel" in merged:
    merged["kernel"] = dense(merged["kernel"])
  if "lora_a" in params:
    merged["kernel"] = _multiplied(merged["kernel"], params, config.adapter)
  return merged


def _multiplied(kernel, params: Mapping[str, Any], adapter: LoRA):
  """Returns a kernel, alone or stacked by layers, with its adapter in it."""
  own = {name: params[name] for name in NAMES if name in params}
  a, b = own["lora_a"], own["lora_b"]
  flat = kernel.reshape(*a.shape[:-1], b.shape[-1])
  merged = adapter.merged
  for _ in range(a.ndim - 2):
    merged = jax.vmap(merged)
  return merged(flat, own).reshape(kernel.shape).astype(kernel.dtype)


def without_adapters(params: PyTree) -> PyTree:
  """Returns parameters without those of adapters, which are dropped."""
  if not isinstance(params, dict):
    return params
  return {
    name: without_adapters(value)
    for name, value in params.items()
    if name not in NAMES
  }


def matrices(params: PyTree) -> dict[str, Any]:
  """Returns the matrices that may have adapters, by their targets' paths."""
  found = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(
    params, is_leaf=lambda x: not isinstance(x, dict)
  ):
    owner, _, name = jax.tree_util.keystr(
      path, simple=True, separator="/"
    ).rpartition("/")
    if name == "kernel" and re.fullmatch(_MATRICES, owner):
      found[owner] = leaf
  return found


def check_targets(params: PyTree, adapter: LoRA) -> None:
  """Checks that adapters are on some matrix of a network.

  Raises:
    ValueError: they are on none.
  """
  legal = matrices(params)
  if adapter.rank and not any(adapter.on(path) for path in legal):
    raise ValueError(
      f"adapter.targets {adapter.targets!r} matches no matrix; legal:"
      f" {', '.join(legal)}"
    )

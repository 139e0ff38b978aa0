"""Matrices of a network's layers in 8 and 4 bits, through qwix.

Products: both factors are quantised as they meet, by the largest entry of each position and
of each output feature, so that there is no state and parameters stay what they
are. "int8" multiplies forward in int8 and leaves gradients alone; "fp8" also
multiplies gradients, forward in float8_e4m3fn and backward in float8_e5m2
(arXiv:2209.05433). Embeddings, norms, attention scores, routers, experts and the
unembedding keep the network's type.

Frozen matrices (`freeze`): held in fewer bits and read back for every product, by
the largest of 64 entries of an output feature each. "int8" and "int4" are even
steps, "nf4" the quantiles of a normal distribution (arXiv:2305.14314, sec. 3).
"""

import importlib.util
import re
from typing import Any, Literal

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from dllm_jax.core.axes import (
  AXES,
  axis_size,
  of_rows,
  platform,
  summed_product,
)

MATMULS = ("default", "int8", "fp8")
Matmul = Literal["default", "int8", "fp8"]

BASES = ("default", "int8", "int4", "nf4")
"""What frozen matrices may be held in."""

_TILE = 64  # entries that share a scale


def check_matmul(name: str) -> None:
  """Raises ValueError unless products can be computed so."""
  if name not in MATMULS:
    raise ValueError(
      f"matmul {name!r} is unknown; choose one of {', '.join(MATMULS)}"
    )
  _check_qwix("matmul", name)


def check_base(name: str) -> None:
  """Raises ValueError unless frozen matrices can be held so."""
  _check_qwix("adapter.base", name)


def _check_qwix(what: str, name: str) -> None:
  if name != "default" and importlib.util.find_spec("qwix") is None:
    raise ValueError(
      f"{what} {name!r} needs qwix; pip install 'dllm_jax[quantized]', or take"
      f" {what} 'default'"
    )


def product(
  x: Float[Array, "*n D"], kernel: Float[Array, "D F"], matmul: Matmul
) -> Float[Array, "*n F"]:
  """Returns x kernel, in the type of both."""
  if matmul == "default":
    if axis_size(*AXES) > 1:
      return x @ kernel
    # Of positions along several axes, XLA's CPU compiler would copy both factors
    # of the kernel's gradient; one axis would mix those that a mesh divides.
    y = _flat_product(x.reshape(-1, x.shape[-1]), kernel)
    return y.reshape(*x.shape[:-1], -1)
  # The function behind qwix.QtProvider: the provider itself patches jax while
  # a module is called, which traces kept from before would escape.
  from qwix._src.core import dot_general_qt as qt  # pylint: disable=g-import-not-at-top

  forward, backward = {
    "int8": (jnp.int8, None),
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
  }[matmul]
  config = qt.DotGeneralQtConfig(
    lhs_qtype=forward,
    rhs_qtype=forward,
    dlhs_grad_qtype=backward,
    drhs_grad_qtype=backward,
    use_original_residuals=backward is None,
  )
  contract = (((x.ndim - 1,), (0,)), ((), ()))
  return qt.dot_general_qt(x, kernel, contract, config).astype(x.dtype)


def _flat_product(x, kernel):
  if platform() == "cpu" and x.dtype == jnp.bfloat16:
    wide = lambda x: summed_product("nd,df->nf", x, kernel)
    return of_rows(wide, x).astype(x.dtype)
  return x @ kernel


def is_quantised(leaf: Any) -> bool:
  """Returns whether a matrix is held in fewer bits: qwix's `QArray`."""
  return hasattr(leaf, "qvalue")


def dense(kernel: Any) -> Float[Array, "..."]:
  """Returns a matrix in a type that it can be multiplied in."""
  if not is_quantised(kernel):
    return kernel
  import qwix  # pylint: disable=g-import-not-at-top

  return qwix.dequantize(kernel)


def frozen_product(
  x: Float[Array, "*n D"], kernel: Any, matmul: Matmul
) -> Float[Array, "*n F"]:
  """Returns x times a matrix that is held in fewer bits.

  For the backward pass only those are kept: the matrix is read back again.

  Args:
    x: inputs.
    kernel: the matrix, `[*inputs, *outputs]`.
    matmul: how the product is computed.
  """

  @jax.checkpoint
  def run(x, kernel):
    flat = dense(kernel).astype(x.dtype).reshape(x.shape[-1], -1)
    return product(x, flat, matmul)

  return run(x, kernel)


def freeze(params: PyTree, base: str) -> PyTree:
  """Returns parameters, the matrices of layers among them in fewer bits.

  Args:
    params: parameters by paths such as "model/layers/attention/q/kernel".
    base: one of `BASES`.
  """
  if base == "default":
    return params

  def held(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    found = re.fullmatch(
      r"(.*/)?layers/(attention|mlp)(/shared)?/(?!router)([a-z]+)/kernel", name
    )
    return leaf if found is None else _held(leaf, found[4] == "o", base)

  return jax.tree_util.tree_map_with_path(held, params)


def _held(kernel: Float[Array, "N ..."], two_inputs: bool, base: str):
  """Returns a stack of matrices in fewer bits, a layer at a time."""
  import qwix  # pylint: disable=g-import-not-at-top

  axis = 1 if two_inputs else 0  # tiles lie along the last axis that is summed
  size = kernel.shape[1 + axis]
  qtype = base if base == "nf4" else jnp.dtype(base)
  others = [i for i in range(kernel.ndim - 1) if i != axis]
  tile = _TILE if size % _TILE == 0 else size
  quantise = lambda layer: qwix.quantize(
    layer, qtype, channelwise_axes=others, tiled_axes={axis: tile}
  )
  return lax.map(quantise, kernel)


def stored(abstract: PyTree) -> PyTree:
  """Returns shapes and types of parameters as `freeze` takes them."""
  return jax.tree.map(
    lambda x: (
      jax.ShapeDtypeStruct(
        x.qvalue.shape, x.scale.dtype, sharding=x.qvalue.sharding
      )
      if is_quantised(x)
      else x
    ),
    abstract,
    is_leaf=is_quantised,
  )

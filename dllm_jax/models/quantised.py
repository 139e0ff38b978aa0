"""Matrix products in 8 bits through qwix, for the weights of a network's layers.

Both factors are quantised as they meet, by the largest entry of each position and
of each output feature, so that there is no state and parameters stay what they
are. "int8" multiplies forward in int8 and leaves gradients alone; "fp8" also
multiplies gradients, forward in float8_e4m3fn and backward in float8_e5m2
(arXiv:2209.05433). Embeddings, norms, attention scores, routers, experts and the
unembedding keep the network's type.
"""

import importlib.util
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from dllm_jax.core.axes import AXES, axis_size

MATMULS = ("default", "int8", "fp8")
Matmul = Literal["default", "int8", "fp8"]


def check_matmul(name: str) -> None:
  """Raises ValueError unless products can be computed so."""
  if name not in MATMULS:
    raise ValueError(
      f"matmul {name!r} is unknown; choose one of {', '.join(MATMULS)}"
    )
  if name != "default" and importlib.util.find_spec("qwix") is None:
    raise ValueError(
      f"matmul {name!r} needs qwix; pip install 'dllm_jax[quantized]', or take"
      " matmul 'default'"
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
    y = x.reshape(-1, x.shape[-1]) @ kernel
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

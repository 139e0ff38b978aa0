"""Perceptrons of a block: the same for every position, no routing.

Each is called `(x, real)` as `moe.Experts` is, and returns `(y, aux)`; these
report nothing in `aux`.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn

from dllm_jax.models.layers import Linear, scaled_normal

gelu_tanh = functools.partial(nn.gelu, approximate=True)


class SwiGLU(nn.Module):
  """(silu(x G) * x U) W, without biases (arXiv:2002.05202).

  Attributes:
    config: the network's.
    dim: hidden features; None for the config's.
    activation: of the gate.
  """

  config: Any
  dim: int | None = None
  activation: Callable = nn.silu

  @nn.compact
  def __call__(self, x, real):
    """Returns the perceptron of each position, and nothing to report."""
    c = self.config
    dim = self.dim or c.mlp_dim
    wide = lambda name: Linear(
      (c.width,),
      (dim,),
      dtype=c.dtype,
      adapter=c.adapter,
      matmul=c.matmul,
      name=name,
    )
    down = Linear(
      (dim,),
      (c.width,),
      dtype=c.dtype,
      kernel_init=scaled_normal((2 * c.layers) ** -0.5),
      adapter=c.adapter,
      matmul=c.matmul,
      name="down",
    )
    return down(self.activation(wide("gate")(x)) * wide("up")(x)), {}


class GeluMlp(nn.Module):
  """gelu(x U + b) W + c, gelu by its tanh form."""

  config: Any

  @nn.compact
  def __call__(self, x, real):
    """Returns the perceptron of each position, and nothing to report."""
    c = self.config
    linear = lambda inputs, outputs, name: Linear(
      (inputs,),
      (outputs,),
      bias=True,
      dtype=c.dtype,
      adapter=c.adapter,
      matmul=c.matmul,
      name=name,
    )
    x = gelu_tanh(linear(c.width, c.mlp_dim, "up")(x))
    return linear(c.mlp_dim, c.width, "down")(x), {}

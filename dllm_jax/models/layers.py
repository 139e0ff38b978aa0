"""Small Linen layers that the networks share, and the scan over a stack.

Parameters are float32; arithmetic is in the layer's dtype, norms in float32.
Networks themselves are in `transformer` and `dit`.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
import types

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from dllm_jax.core.axes import BATCH_AXES, constrain, CONTEXT, TENSOR
from dllm_jax.models.adapters import LoRA, one_is_cheaper
from dllm_jax.models.quantised import (
  dense,
  frozen_product,
  is_quantised,
  Matmul,
  product,
)

DTYPES = ("float32", "bfloat16")

_POLICIES = jax.checkpoint_policies
PRODUCT = "product"
"""The name of what kernels of matrix products make, for "dots" to keep."""

REMAT: Mapping[str, Callable | None] = types.MappingProxyType({
  "none": None,
  "full": _POLICIES.nothing_saveable,
  "dots": _POLICIES.save_from_both_policies(
    _POLICIES.dots_saveable, _POLICIES.save_only_these_names(PRODUCT)
  ),
  "dots_no_batch": _POLICIES.dots_with_no_batch_dims_saveable,
})
"""What a layer keeps for its backward pass, by name.

"none" keeps everything, "full" nothing but its input, "dots" the results of
matrix products, "dots_no_batch" those of products with weights only (attention
scores are formed again).
"""


def scaled_normal(scale: float = 1.0) -> Callable:
  """Returns an initialiser: normal of deviation scale / sqrt(fan in).

  The fan in is the product of all dimensions but the `out` ones that `Linear`
  has flattened away: kernels are initialised as `[in, out]`.
  """

  def init(key, shape, dtype=jnp.float32):
    return jax.random.normal(key, shape, dtype) * (scale * shape[0] ** -0.5)

  return init


class Linear(nn.Module):
  """x W (+ b), contracting the last `len(inputs)` axes of x.

  Attributes:
    inputs: sizes of the contracted axes.
    outputs: sizes of the new axes; the kernel is `[*inputs, *outputs]`.
    bias: whether b is there, `[*outputs]`, zero at first.
    dtype: of the product.
    kernel_init: initialiser of the kernel, flattened to `[in, out]`.
    adapter: low-rank changes of kernels, for those that it is on; None for none.
    matmul: how the product is computed (`quantised.MATMULS`).
  """

  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  bias: bool = False
  dtype: str = "float32"
  kernel_init: Callable = scaled_normal()
  adapter: LoRA | None = None
  matmul: Matmul = "default"

  @nn.compact
  def __call__(self, x: Float[Array, "B T *inputs"]):
    """Returns the product, `[B, T, *outputs]`."""
    fan_in, fan_out = math.prod(self.inputs), math.prod(self.outputs)
    shape = (*self.inputs, *self.outputs)

    def init(key):
      return self.kernel_init(key, (fan_in, fan_out)).reshape(shape)

    kernel = self.param("kernel", init)
    lead = x.shape[: x.ndim - len(self.inputs)]
    x = x.reshape(*lead, fan_in).astype(self.dtype)
    flat = lambda: dense(kernel).astype(self.dtype).reshape(fan_in, fan_out)
    own = {}
    if self.adapter is not None and self.adapter.on(matrix_name(self.path)):
      inits = self.adapter.init(fan_in, fan_out)
      own = {name: self.param(name, init) for name, init in inits.items()}
    if own and self.matmul == "default" and one_is_cheaper(x, fan_out):
      y = self.adapter.apply_as_one(x, kernel, own)
    else:
      if is_quantised(kernel):
        y = frozen_product(x, kernel, self.matmul)
      else:
        y = product(x, flat(), self.matmul)
      if own:
        y = self.adapter.apply(x, y, flat(), own)
    y = y.reshape(*lead, *self.outputs)
    if self.bias:
      bias = self.param("bias", nn.initializers.zeros, self.outputs)
      y += bias.astype(self.dtype)
    return y


class Weight(nn.Module):
  """A bare matrix, read by index or handed on: embedding, unembedding.

  Attributes:
    param_name: the name of the one parameter inside.
    shape: its shape.
    kernel_init: initialiser.
  """

  param_name: str
  shape: tuple[int, int]
  kernel_init: Callable = nn.initializers.normal(0.02)

  @nn.compact
  def __call__(self) -> Float[Array, "n m"]:
    """Returns the matrix."""
    return self.param(self.param_name, self.kernel_init, self.shape)


def lookup(
  table: Float[Array, "V D"], ids: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
  """Returns a table's rows, after gathering its features over `fsdp`.

  Of a table divided by features, each device would look up its own features of
  all rows of the batch, which the compiler then replicates before it divides them.
  """
  return constrain(constrain(table, TENSOR, None)[ids], BATCH_AXES, CONTEXT)


def unit_rms(x: Float[Array, "*n D"], eps: float) -> Float[Array, "*n D"]:
  """Returns x / rms(x) over the last axis, in float32."""
  y = x.astype(jnp.float32)
  return y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
  """gain x / rms(x) * scale over the last axis, in float32 (arXiv:1910.07467).

  Attributes:
    eps: added to mean squares.
    gain: a constant factor, applied before rounding to the type of x.
  """

  eps: float
  gain: float = 1.0

  @nn.compact
  def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """Returns x, normalised, in its own type."""
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    y = unit_rms(x, self.eps) * scale.astype(jnp.float32)
    return (y if self.gain == 1 else y * self.gain).astype(x.dtype)


class LayerNorm(nn.Module):
  """(x - mean) / deviation * scale over the last axis, in float32; no shift."""

  eps: float

  @nn.compact
  def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
    """Returns x, normalised, in its own type."""
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    y = x.astype(jnp.float32)
    y -= jnp.mean(y, axis=-1, keepdims=True)
    y *= lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


class TimeEmbedding(nn.Module):
  """A sinusoid of the time through a two-layer perceptron.

  Features are cos(t w_i), then sin(t w_i), w_i = period^(-i / half) in float32.

  Attributes:
    width: features out.
    features: sinusoidal features, half cosines and half sines.
    period: the longest period over 2 pi.
  """

  width: int
  features: int = 256
  period: float = 10_000.0

  @nn.compact
  def __call__(self, t: Float[Array, "B #T"]) -> Float[Array, "B #T C"]:
    """Returns features of the times."""
    half = self.features // 2
    w = jnp.exp(-math.log(self.period) / half * jnp.arange(half))
    angles = t.astype(jnp.float32)[..., None] * w
    x = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    x = Linear((self.features,), (self.width,), bias=True, name="hidden")(x)
    return Linear((self.width,), (self.width,), bias=True, name="out")(
      nn.silu(x)
    )


def modulate(x, shift, scale):
  """Returns x (1 + scale) + shift, as adaptive norms do (arXiv:2212.09748)."""
  return x * (1 + scale) + shift


def stack(
  block: type, *, layers: int, remat: str, unroll: int, apart: bool = False
) -> Callable:
  """Returns what makes, of `block`'s fields, a module that runs all layers.

  The block is called as `(carry, shared, own) -> (carry, out)`: `shared` is the
  same for all layers, `own` and `out` are stacked by layer on their first axis.
  What is large and changed in part belongs to the carry, which stays in place.

  Args:
    block: a layer.
    layers: how many there are.
    remat: what each keeps for the backward pass.
    unroll: layers in a round of the loop over parameters stacked on axis 0.
    apart: whether parameters lie as `apart` has them; there is no loop then.
  """
  if remat != "none":
    # A loop keeps the two passes apart; unrolled whole, the compiler would find
    # what is computed twice and keep it after all.
    block = nn.remat(block, policy=REMAT[remat], prevent_cse=unroll >= layers)
  if apart:
    return functools.partial(Apart, block, layers)
  scan = nn.scan(
    block,
    variable_axes={"params": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=(nn.broadcast, 0),
    out_axes=0,
    length=layers,
    unroll=min(unroll, layers),
  )
  return lambda fields, name: scan(*fields, name=name)


class Apart(nn.Module):
  """Layers one after another, the parameters of each under its number.

  Attributes:
    block: a layer.
    layers: how many there are.
    fields: of each.
  """

  block: type
  layers: int
  fields: tuple

  def setup(self):
    """Makes the layers."""
    for i in range(self.layers):
      setattr(self, str(i), self.block(*self.fields))

  def __call__(self, carry, shared, own):
    """Returns what the last layer passes on, and what all report."""
    outs = []
    for i in range(self.layers):
      mine = jax.tree.map(lambda x, i=i: x[i], own)
      carry, out = self.layer(i, carry, shared, mine)
      outs.append(out)
    return carry, stacked(outs)

  def layer(self, number: int, carry, shared, own):
    """Returns what one layer passes on, and what it reports."""
    return getattr(self, str(number))(carry, shared, own)


def stacked(trees: Sequence[PyTree]) -> PyTree:
  """Returns one tree, its arrays stacked on a new first axis."""
  return jax.tree.map(lambda *x: jnp.stack(x), *trees)


_STACK = "layers"


def apart(params: PyTree) -> PyTree:
  """Returns parameters with each layer's arrays by themselves, under its number.

  Products on CPUs and GPUs read whole arrays: of a stack, XLA copies a layer's
  matrices at each call, and of a loop's on GPUs all of them, to read them twice.
  Parted once, before a program calls the network in a loop, none is copied again.
  """
  if not isinstance(params, Mapping) or is_apart(params):
    return params

  def split(stack):
    layers = len(jax.tree.leaves(stack)[0])
    one = lambda i: jax.tree.map(lambda x: x[i], stack)
    return {str(i): one(i) for i in range(layers)}

  return {
    name: split(x) if name == _STACK else apart(x) for name, x in params.items()
  }


def is_apart(params: PyTree) -> bool:
  """Whether `apart` made these parameters."""
  return isinstance(params, Mapping) and any(
    "0" in x if name == _STACK else is_apart(x) for name, x in params.items()
  )


def matrix_name(path: Sequence[str]) -> str:
  """Returns the name of a module's matrix: without the number of its layer."""
  return "/".join(part for part in path if not part.isdigit())


def check_choice(what: str, value, choices) -> None:
  """Raises ValueError unless value is among the choices."""
  if value not in choices:
    raise ValueError(
      f"{what} {value!r} is unknown; choose one of {', '.join(choices)}"
    )


def check_at_least(config, low: int, *fields: str) -> None:
  """Raises ValueError unless the named fields of a config reach `low`."""
  for field in fields:
    value = getattr(config, field)
    if value is not None and value < low:
      raise ValueError(
        f"{type(config).__name__}.{field} must be at least {low}, not {value}"
      )

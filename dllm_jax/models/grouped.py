r"""Products of rows by the matrices of their experts: kernels, or tiles.

A ragged product is a kernel on TPUs, and on GPUs with tokamax (`product`). Where it
is none (XLA on GPUs multiplies all rows by all experts), choices are sorted by
expert and each expert's run is padded to whole tiles of b rows,

    tiles <= N k / b + E,    b about a quarter of N k / E,

so that any routing fits a static number of tiles, and a step of a loop multiplies
several of them, each by the matrices of its own expert (`mixture`). Tiles without
rows are multiplied too: a quarter more than needed. Nothing is kept for the
backward pass but the inputs; it runs each tile's perceptron again.
"""

from collections.abc import Callable
import functools
import logging

from absl import flags
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.core.axes import axis_size, EXPERT, platform
from dllm_jax.models.layers import PRODUCT

_MANY = 1024  # rows of an expert that are worth a program unrolled over experts
_LARGEST_TILE = 512
_ROWS = 8192  # of a step: enough to keep a GPU busy


@functools.cache
def library():
  """Returns tokamax, kernels of grouped products for GPUs, or None."""
  try:
    import tokamax  # pylint: disable=g-import-not-at-top
  except ImportError:
    return None
  # It would read the command line for flags of its own.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  # It warns at each product that has not been tuned, in some hundred lines.
  tuned = lambda record: "Autotuning cache miss" not in str(record.msg)
  logging.getLogger("absl").addFilter(tuned)
  return tokamax


def product(
  rows: Float[Array, "n D"],
  kernel: Float[Array, "E D F"],
  *,
  sizes: Int[Array, "E"],
) -> Float[Array, "n F"]:
  """Returns rows, sorted by expert, times the matrices of their experts.

  Args:
    rows: those of the first expert first; what is left over is of none.
    kernel: the experts' matrices.
    sizes: how many rows each expert has.
  """
  kernels = None if platform() in ("cpu", "tpu") else library()
  if kernels is None:
    return checkpoint_name(lax.ragged_dot(rows, kernel, sizes), PRODUCT)
  # Traced by itself: it looks for its arguments' devices in all that was traced.
  multiply = jax.jit(kernels.ragged_dot, static_argnames="implementation")
  # Mosaic's has a part of its program for each expert, Triton's of its grid: the
  # one compiles for minutes where layers lie apart, the other idles at many rows.
  experts = sizes.size * axis_size(EXPERT)  # whose rows all are here
  many = rows.shape[0] >= _MANY * experts
  fits = all(n % 64 == 0 for n in kernel.shape[1:])  # its tiles
  mosaic = ("mosaic",) if fits else ()
  kinds = (*(mosaic if many else ()), "triton", "xla")
  try:
    out = multiply(rows, kernel, sizes, implementation=kinds)
  except ValueError as error:
    if "Unknown implementation" not in str(error):
      raise
    # From 0.0.17 on Triton's is there with the package triton only.
    kinds = (*mosaic, "xla")
    out = multiply(rows, kernel, sizes, implementation=kinds)
  return checkpoint_name(out, PRODUCT)


def mixture(
  x: Float[Array, "*n D"],
  chosen: Int[Array, "*n k"],
  weights: Float[Array, "*n k"],
  kernels: tuple[Float[Array, "E D F"], ...],
  first: Int[Array, ""] | int,
  activation: Callable = jax.nn.silu,
) -> Float[Array, "*n D"]:
  """Returns the weighted sum of the chosen experts that are among these.

  Args:
    x: positions.
    chosen: their experts.
    weights: what each expert's output is multiplied by.
    kernels: gate, up `[E, D, F]` and down `[E, F, D]` of the experts at hand.
    first: the number of the first of them.
    activation: of their gates.
  """
  local = (chosen - first).reshape(-1)
  flat, weights = x.reshape(-1, x.shape[-1]), weights.reshape(-1)
  tiles = _tiles(local, kernels[0].shape[0])
  return (
    _mixture(activation, flat, weights, kernels, tiles)
    .astype(x.dtype)
    .reshape(x.shape)
  )


def _tiles(local, experts: int):
  """Returns what each tile holds, and whose it is, `[steps, tiles, b]`.

  Tiles hold choices, of N k; a place that is empty has number N k.
  """
  choices = local.size
  size = 1 << max((choices // (4 * experts)).bit_length() - 1, 0)
  size = min(size, _LARGEST_TILE)
  together = max(min(_ROWS, choices) // size, 1)
  steps = -(-(choices // size + experts) // together)
  count = steps * together

  owner = jnp.where((local >= 0) & (local < experts), local, experts)
  order = jnp.argsort(owner, stable=True)  # others' experts come last
  sizes = jnp.bincount(owner, length=experts + 1)[:experts]
  used = -(-sizes // size)
  starts, firsts = jnp.cumsum(sizes) - sizes, jnp.cumsum(used) - used
  tile = jnp.arange(count)
  expert = jnp.searchsorted(firsts + used, tile, side="right")
  expert = jnp.minimum(expert, experts - 1)  # of what is left over, too
  place = (tile - firsts[expert])[:, None] * size + jnp.arange(size)
  there = place < sizes[expert][:, None]
  at = order.at[starts[expert][:, None] + place].get(mode="clip")
  at = jnp.where(there, at, choices)
  shape = (steps, together)
  return at.reshape(*shape, size), expert.reshape(shape)


def _perceptron(activation, rows, weight, gate, up, down):
  """Returns `[t, b, D]` of t tiles, each by its own matrices."""
  product = functools.partial(jnp.einsum, "tbd,tdf->tbf")
  hidden = activation(product(rows, gate)) * product(rows, up)
  return product(hidden, down) * weight[..., None].astype(rows.dtype)


def _taken(flat, weights, kernels, tile):
  """Returns a step's rows, weights and matrices, and where the rows come from.

  An empty place is given zeros, and what it makes goes nowhere.
  """
  at, expert = tile
  count = weights.size // flat.shape[0]
  source = at // count
  take = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0)
  return source, (
    take(flat, source),
    take(weights, at),
    *(kernel[expert] for kernel in kernels),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mixture(activation, flat, weights, kernels, tiles):
  def step(total, tile):
    source, arguments = _taken(flat, weights, kernels, tile)
    y = _perceptron(activation, *arguments).astype(total.dtype)
    return total.at[source].add(y, mode="drop"), None

  return lax.scan(step, jnp.zeros(flat.shape, jnp.float32), tiles)[0]


def _forward(activation, flat, weights, kernels, tiles):
  return _mixture(activation, flat, weights, kernels, tiles), (
    flat,
    weights,
    kernels,
    tiles,
  )


def _backward(activation, saved, d_total):
  flat, weights, kernels, tiles = saved
  perceptron = functools.partial(_perceptron, activation)

  def step(totals, tile):
    d_flat, d_weights, d_kernels = totals
    source, arguments = _taken(flat, weights, kernels, tile)
    y, pull = jax.vjp(perceptron, *arguments)
    d_y = jnp.take(d_total, source, axis=0, mode="fill", fill_value=0)
    d_rows, d_weight, *d_tiles = pull(d_y.astype(y.dtype))
    wide = lambda x: x.astype(jnp.float32)
    return (
      d_flat.at[source].add(wide(d_rows), mode="drop"),
      d_weights.at[tile[0]].set(d_weight, mode="drop"),
      tuple(
        total.at[tile[1]].add(wide(d), indices_are_sorted=True)
        for total, d in zip(d_kernels, d_tiles, strict=True)
      ),
    ), None

  zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
  totals = (zeros(flat), jnp.zeros_like(weights), tuple(map(zeros, kernels)))
  totals = lax.scan(step, totals, tiles)[0]
  same = lambda d, x: d.astype(x.dtype)
  return *jax.tree.map(same, totals, saved[:3]), None


_mixture.defvjp(_forward, _backward)

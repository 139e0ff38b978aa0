"""What numerics know of where they run: names of mesh axes, and the platform."""

from collections.abc import Callable
import functools
import math

import jax
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Shaped

_FOLDS = 4

DATA, FSDP, TENSOR, CONTEXT, EXPERT = (
  "data",
  "fsdp",
  "tensor",
  "context",
  "expert",
)
AXES = (DATA, FSDP, TENSOR, CONTEXT, EXPERT)
BATCH_AXES = (DATA, FSDP, EXPERT)
"""The axes that divide the rows of a batch."""


def axis_size(*names: str) -> int:
  """Returns the product of the named axes of the current mesh; 1 without one."""
  mesh = jax.sharding.get_abstract_mesh()
  return math.prod(mesh.shape[name] for name in names if name in mesh.shape)


def shares(rows: int, heads: int) -> tuple[tuple[str, ...] | None, str | None]:
  """Returns the axes that divide rows, and the one that divides heads.

  None where the mesh has none, or they are no equal shares.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(name for name in BATCH_AXES if name in mesh.shape)
  return (
    axes if axes and rows % axis_size(*axes) == 0 else None,
    TENSOR if TENSOR in mesh.shape and heads % axis_size(TENSOR) == 0 else None,
  )


def platform() -> str:
  """Returns the platform that is compiled for, which need not be here."""
  mesh = jax.sharding.get_abstract_mesh()
  device = getattr(mesh, "abstract_device", None)
  kind = getattr(device, "device_kind", None)
  if kind is not None:
    return "tpu" if "TPU" in kind.upper() else kind
  return jax.default_backend()


def constrain(x: jax.Array, *spec: str | tuple[str, ...] | None) -> jax.Array:
  """Returns x, told to lie along the named mesh axes; x itself without a mesh.

  Names that the mesh lacks are left out, and of the axes of a dimension only the
  first ones that divide it are taken (a single prompt on many devices: none).

  Args:
    x: an array with at least `len(spec)` dimensions.
    *spec: for each dimension the axis or axes that divide it, or None.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x

  def place(names, size):
    names = (names,) if isinstance(names, str) else names or ()
    names = tuple(name for name in names if name in mesh.shape)
    while names and size % axis_size(*names):
      names = names[:-1]
    return names or None

  spec = jax.P(*map(place, spec, x.shape))
  return lax.with_sharding_constraint(x, spec)


def once(x: PyTree[Array]) -> PyTree[Array]:
  """Returns arrays, small ones, that all who read them share.

  On CPUs XLA computes what is elementwise again in each loop that reads it, for
  each element: a cosine for every head of queries, a mask from its segments for
  every score. It ignores barriers there, but not the result of a condition, of
  which it does not know that it always holds.
  """
  if platform() != "cpu" or axis_size(*AXES) > 1:
    return x
  first = (jax.tree.leaves(x)[0].ravel()[0] != 0).astype(jnp.float32)
  none = lambda x: jax.tree.map(jnp.zeros_like, x)
  return lax.cond(first == first, lambda x: x, none, x)  # noqa: PLR0124


def folded(pick: jnp.ufunc, x: Shaped[Array, "*n S"]) -> Shaped[Array, "*n"]:
  """Returns the largest (`jnp.maximum`) or smallest (`jnp.minimum`) of each row.

  On CPUs a row's second half is first laid on its first, `_FOLDS` times: XLA picks
  elementwise by vectors, and along a row one by one (0.15 ms for 32 rows of 32,000
  numbers, and 0.46 so). NaN where a row has one.

  Args:
    pick: which.
    x: rows of at least one number.
  """
  if platform() == "cpu":
    for _ in range(_FOLDS):
      half = -(-x.shape[-1] // 2)
      # They overlap where S is odd: what is picked twice stays picked.
      x = pick(x[..., :half], x[..., -half:])
  return pick.reduce(x, axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def summed_product(
  axes: str, a: Float[Array, "..."], b: Float[Array, "..."]
) -> Float[Array, "..."]:
  """Returns einsum(axes, a, b) summed to float32, gradients in the type of both.

  Of its own accord jax would multiply float32 gradients by 16-bit factors, at the
  speed of float32. So would XLA on CPUs, where bfloat16 is multiplied as such only
  to be summed to float32 (findings/xla_cpu_products_of_bfloat16.sh).

  Args:
    axes: `"ab,bc->ac"`; each axis of a factor is in the other or in the result.
    a: a factor, float32 or bfloat16.
    b: another one, of the same type.
  """
  return jnp.einsum(axes, a, b, preferred_element_type=jnp.float32)


def _product_forward(axes, a, b):
  return summed_product(axes, a, b), (a, b)


def _product_backward(axes, saved, gradient):
  a, b = saved
  gradient = gradient.astype(a.dtype)
  wide = jnp.float32 if platform() == "cpu" else None
  factors, out = axes.split("->")
  of_a, of_b = factors.split(",")
  d_a = jnp.einsum(
    f"{out},{of_b}->{of_a}", gradient, b, preferred_element_type=wide
  )
  d_b = jnp.einsum(
    f"{out},{of_a}->{of_b}", gradient, a, preferred_element_type=wide
  )
  return d_a.astype(a.dtype), d_b.astype(b.dtype)


summed_product.defvjp(_product_forward, _product_backward)


def of_rows(
  product: Callable[[Float[Array, "*n D"]], Float[Array, "*n F"]],
  x: Float[Array, "*n D"],
) -> Float[Array, "*n F"]:
  """Returns product(x), on CPUs in bfloat16 by way of two rows where x has one.

  XLA multiplies a matrix by a vector there in float32: all of the matrix would be
  made wide at each call (findings/xla_cpu_products_of_bfloat16.sh).

  Args:
    product: of rows with a matrix, each row alone.
    x: the rows.
  """
  one = x.size == x.shape[-1] and x.dtype == jnp.bfloat16
  if not one or platform() != "cpu":
    return product(x)
  return product(jnp.concatenate([x, x]))[:1]


def product_with_table(
  x: Float[Array, "*n D"], table: Float[Array, "V D"]
) -> Float[Array, "*n V"]:
  """Returns x table^T, summed to float32 at least.

  On CPUs the table is the first factor, and what comes is turned. A second one
  that is read across costs XLA's own products of float32 4 to 30 times as much, for
  4 to 32 rows by 152,000 tokens, and a loop a turned copy of the table, of either
  type. The barrier keeps XLA from turning the product back, the layout what follows
  from being turned as well.

  Args:
    x: rows, in the table's type.
    table: such as embeddings.
  """
  wide = jnp.promote_types(x.dtype, jnp.float32)
  if platform() != "cpu" or axis_size(*AXES) > 1:
    return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=wide)
  y = lax.optimization_barrier(
    jnp.einsum("vd,...d->v...", table, x, preferred_element_type=wide)
  )
  y = jnp.moveaxis(y, 0, -1)
  return with_layout_constraint(y, Layout(tuple(range(y.ndim))))

r"""Mixtures of experts: each position's perceptron is chosen by a router.

Scores of E experts come from a softmax or a sigmoid of the router's logits. The
k best are chosen, after adding a bias that only the choice sees, and within the
best groups of experts only; their outputs are summed with their scores,

    y = c sum_{e chosen} p_e F_e(x) (+ F_shared(x)),

p_e divided by their sum if so configured. No token is ever dropped: positions
are sorted by expert and multiplied in ragged groups, or in tiles (`grouped`).
Over a mesh, each device has the experts of its share of axis `expert`, sees the
positions of all of that axis, and adds up what its experts make of them.

The router's balance loss E sum_e f_e P_e (arXiv:2101.03961, eq. 4), f_e choices
of expert e a position and P_e its mean score, is k where all are used alike.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.core.axes import (
  axis_size,
  BATCH_AXES,
  CONTEXT,
  EXPERT,
  platform,
  TENSOR,
)
from dllm_jax.models import grouped, quantised
from dllm_jax.models.layers import scaled_normal, unit_rms
from dllm_jax.models.perceptron import SwiGLU

ROUTERS = ("softmax", "sigmoid")
_FEW = 512  # positions: of more, products cost more than tiles' copies do


def choose(
  scores: Float[Array, "*n E"],
  *,
  count: int,
  groups: int = 1,
  top_groups: int = 1,
) -> Int[Array, "*n k"]:
  """Returns the `count` best experts, all in the `top_groups` best groups.

  A group of neighbours is as good as the sum of its two best experts.
  """
  if groups > 1:
    grouped = scores.reshape(*scores.shape[:-1], groups, -1)
    best = jnp.sum(lax.top_k(grouped, min(2, grouped.shape[-1]))[0], axis=-1)
    kept = lax.top_k(best, top_groups)[1]
    kept = jnp.any(kept[..., None] == jnp.arange(groups), axis=-2)
    grouped = jnp.where(kept[..., None], grouped, -jnp.inf)
    scores = grouped.reshape(scores.shape)
  return lax.top_k(scores, count)[1]


def shortlist(
  scores: Float[Array, "B T E"],
  real: Bool[Array, "B T"],
  *,
  block: int,
  capacity: int,
) -> Float[Array, "B T E"]:
  """Returns scores with -inf at experts that a block of positions leaves out.

  Each block of neighbours, from a row's first position on, has the `capacity`
  experts that one of its positions wants most, ties by number (LLaDA2.2).
  """
  rows, length, experts = scores.shape
  pad = ((0, 0), (0, -length % block))
  wanted = jnp.where(real[..., None], scores, -jnp.inf)
  wanted = jnp.pad(wanted, (*pad, (0, 0)), constant_values=-jnp.inf)
  wanted = jnp.max(wanted.reshape(rows, -1, block, experts), axis=2)
  kept = lax.top_k(wanted, capacity)[1]
  kept = jnp.any(kept[..., None] == jnp.arange(experts), axis=-2)
  kept = jnp.repeat(kept, block, axis=1)[:, :length]
  return jnp.where(kept, scores, -jnp.inf)


class Experts(nn.Module):
  """A routed perceptron, called as those of `perceptron` are.

  Attributes:
    config: the network's.
    activation: of the experts' gates.
    scaled: whether the router scales what it sees, x / rms(x) * s / sqrt(D), and
      each expert's weight by a number of its own (Gemma 4).
  """

  config: Any
  activation: Callable = nn.silu
  scaled: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T D"],
    real: Bool[Array, "B T"],
    seen: Float[Array, "B T D"] | None = None,
  ):
    """Returns the mixture, the balance loss and each expert's share of choices.

    Args:
      x: normalised hidden states.
      real: False at padding, which counts in neither.
      seen: what the router sees; None for x.
    """
    c = self.config
    seen = x if seen is None else seen
    scores, bias, scale = _Router(c, self.scaled, name="router")(seen)
    wanted = lax.stop_gradient(scores) + bias
    if c.expert_capacity:
      wanted = shortlist(
        wanted, real, block=c.expert_block, capacity=c.expert_capacity
      )
    chosen = choose(
      wanted,
      count=c.experts_per_token,
      groups=c.router_groups,
      top_groups=c.router_top_groups,
    )
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if c.router_normalised:
      # As the originals: all scores of a position can underflow to 0.
      weights /= jnp.sum(weights, axis=-1, keepdims=True) + 1e-20
    weights *= c.router_scale
    if scale is not None:
      weights *= scale[chosen]
    kernels = _Kernels(c, name="experts")()
    x = x.astype(c.dtype)
    y = _divided(x, chosen, weights, kernels, c, self.activation)
    if c.shared_dim:
      y += SwiGLU(c, c.shared_dim, name="shared")(x, real)[0]
    return y, _report(scores, chosen, real)


class _Router(nn.Module):
  """Scores of the experts in float32, what is added to choose, and scales."""

  config: Any
  scaled: bool

  @nn.compact
  def __call__(self, x):
    c = self.config
    shape = (c.width, c.experts)
    kernel = self.param("kernel", scaled_normal(), shape)
    x, scale = x.astype(jnp.float32), None
    if self.scaled:
      ones = nn.initializers.ones
      features = self.param("scale", ones, (c.width,)).astype(jnp.float32)
      x = unit_rms(x, c.norm_eps) * features * c.width**-0.5
      scale = self.param("expert_scale", ones, (c.experts,))
      scale = scale.astype(jnp.float32)
    logits = x @ kernel.astype(jnp.float32)
    scores = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}[c.router]
    bias = jnp.zeros(())
    if c.router_bias:
      zeros = nn.initializers.zeros
      bias = self.param("expert_bias", zeros, (c.experts,))
      bias = bias.astype(jnp.float32)
    return scores(logits), bias, scale


class _Kernels(nn.Module):
  """The experts' matrices, gate, up and down, stacked by expert."""

  config: Any

  @nn.compact
  def __call__(self):
    c = self.config
    wide, deep = (c.width, c.expert_dim), (2 * c.layers) ** -0.5
    shapes = {"gate": wide, "up": wide, "down": wide[::-1]}
    scales = {"gate": 1.0, "up": 1.0, "down": deep}
    kernels = (
      self.param(name, _per_expert(scales[name]), (c.experts, *shape))
      for name, shape in shapes.items()
    )
    return tuple(kernel.astype(c.dtype) for kernel in kernels)


def _per_expert(scale):
  def init(key, shape, dtype=jnp.float32):
    return jax.random.normal(key, shape, dtype) * (scale * shape[1] ** -0.5)

  return init


def _report(scores, chosen, real) -> dict[str, Array]:
  experts = scores.shape[-1]
  count = jnp.maximum(jnp.sum(real), 1)
  hits = jnp.sum(chosen[..., None] == jnp.arange(experts), axis=-2)
  used = jnp.sum(hits * real[..., None], axis=(0, 1)) / count
  share = scores / jnp.sum(scores, axis=-1, keepdims=True)
  mean = jnp.sum(share * real[..., None], axis=(0, 1)) / count
  return {
    "balance": experts * jnp.sum(used * mean),
    "expert_share": used / chosen.shape[-1],
  }


def _divided(x, chosen, weights, kernels, config, activation):
  """Returns the mixture, over the mesh if there is one."""
  mesh = jax.sharding.get_abstract_mesh()

  def mix(x, *others):
    kind = _implementation(config, x.size // x.shape[-1])
    return _MIXTURES[kind](x, *others, activation=activation)

  if mesh.empty or mesh.size == 1:
    return mix(x, chosen, weights, kernels, 0)
  rows = tuple(a for a in BATCH_AXES if a in mesh.shape)
  if not rows or x.shape[0] % axis_size(*rows):
    rows = None
  context = CONTEXT if CONTEXT in mesh.shape else None
  if x.shape[1] % axis_size(CONTEXT):
    context = None
  tensor = TENSOR if TENSOR in mesh.shape else None
  expert = EXPERT if EXPERT in mesh.shape else None
  several = axis_size(EXPERT) > 1

  def local(x, chosen, weights, *kernels):
    if several and rows:
      x, chosen, weights = (
        lax.all_gather(a, EXPERT, axis=0, tiled=True)
        for a in (x, chosen, weights)
      )
    first = lax.axis_index(EXPERT) * kernels[0].shape[0] if several else 0
    y = mix(x, chosen, weights, kernels, first)
    if tensor:
      y = lax.psum(y, tensor)
    if several and rows:
      return lax.psum_scatter(y, EXPERT, scatter_dimension=0, tiled=True)
    return lax.psum(y, EXPERT) if several else y

  here, wide = jax.P(rows, context, None), jax.P(expert, None, tensor)
  return jax.shard_map(
    local,
    in_specs=(here, here, here, wide, wide, jax.P(expert, tensor, None)),
    out_specs=here,
    check_vma=False,
  )(x, chosen, weights, *kernels)


def _implementation(config, positions: int) -> str:
  """Returns how experts are multiplied, if the configuration leaves it open.

  A ragged product is a kernel on TPUs, the gradient of its matrices since jax 0.12
  only, and on GPUs with tokamax. Else few positions meet all experts at once.
  """
  if config.experts_implementation:
    return config.experts_implementation
  kind = platform()
  if kind == "cpu":
    return "dense"
  kernel = (
    jax.__version_info__ >= (0, 12) if kind == "tpu" else grouped.library()
  )
  if kernel:
    return "ragged"
  all_chosen = positions * config.experts_per_token >= config.experts
  return "batched" if positions <= _FEW and all_chosen else "tiled"


def _batched(x, chosen, weights, kernels, first, activation=nn.silu):
  """Returns the mixture by running all experts at once on every position."""
  (gate, up, down), count = kernels, chosen.shape[-1]
  ids, flat = first + jnp.arange(len(gate)), x.reshape(-1, x.shape[-1])
  here = chosen.reshape(-1, count) == ids[:, None, None]
  share = jnp.sum(jnp.where(here, weights.reshape(-1, count), 0.0), axis=-1)
  product = functools.partial(jnp.einsum, "nd,edf->enf", flat)
  hidden = activation(product(gate)) * product(up)
  hidden *= share[..., None].astype(hidden.dtype)
  return jnp.einsum("enf,efd->nd", hidden, down).reshape(x.shape)


def _dense(x, chosen, weights, kernels, first, activation=nn.silu):
  """Returns the mixture by running every expert on every position."""
  product = functools.partial(quantised.product, matmul="default")

  def add(total, expert):
    e, gate, up, down = expert
    weight = jnp.sum(jnp.where(chosen == e, weights, 0.0), axis=-1)
    y = product(activation(product(x, gate)) * product(x, up), down)
    return total + y * weight[..., None].astype(y.dtype), None

  ids = first + jnp.arange(kernels[0].shape[0])
  return lax.scan(add, jnp.zeros_like(x), (ids, *kernels))[0]


def _ragged(x, chosen, weights, kernels, first, activation=nn.silu):
  """Returns the mixture by sorting positions by expert."""
  gate, up, down = kernels
  here, count = gate.shape[0], chosen.shape[-1]
  flat, weights = x.reshape(-1, x.shape[-1]), weights.reshape(-1)
  expert = chosen.reshape(-1) - first
  mine = (expert >= 0) & (expert < here)
  expert = jnp.where(mine, expert, here)  # others' experts come last
  order = jnp.argsort(expert, stable=True)
  back = jnp.argsort(order)
  sizes = jnp.bincount(expert, length=here + 1)[:here].astype(jnp.int32)
  product = functools.partial(grouped.product, sizes=sizes)
  # What a kernel leaves in rows of others' experts is anything, forwards and back.
  ours = lambda rows: jnp.where(mine[order, None], rows, 0)
  rows = _spread(flat, order, back, mine.reshape(-1, count))
  hidden = activation(product(rows, gate)) * product(rows, up)
  # Weights before the last product: their gradient then needs none of it.
  hidden = ours(ours(hidden) * weights[order, None].astype(hidden.dtype))
  y = _collect(product(hidden, down), order, back, mine)
  y = y.reshape(-1, count, y.shape[-1])
  return jnp.sum(y, 1, dtype=jnp.float32).astype(x.dtype).reshape(x.shape)


@jax.custom_vjp
def _spread(flat, order, back, mine):
  """Returns the row of each choice, sorted; gathered backwards, not scattered."""
  return flat[order // mine.shape[1]]


def _spread_backward(saved, d_rows):
  back, mine = saved
  d_rows = jnp.where(mine.reshape(-1)[:, None], d_rows[back], 0)
  d_flat = d_rows.reshape(*mine.shape, -1)
  d_flat = jnp.sum(d_flat, 1, dtype=jnp.float32).astype(d_rows.dtype)
  return d_flat, None, None, None


_spread.defvjp(
  lambda flat, order, back, mine: (
    _spread(flat, order, back, mine),
    (back, mine),
  ),
  _spread_backward,
)


@jax.custom_vjp
def _collect(y, order, back, mine):
  """Returns `_spread`'s rows in the order of choices, those of others zero."""
  return jnp.where(mine[:, None], y[back], 0)


def _collect_backward(saved, d_y):
  order, mine = saved
  return jnp.where(mine[order, None], d_y[order], 0), None, None, None


_collect.defvjp(
  lambda y, order, back, mine: (_collect(y, order, back, mine), (order, mine)),
  _collect_backward,
)

_MIXTURES = {
  "ragged": _ragged,
  "tiled": grouped.mixture,
  "batched": _batched,
  "dense": _dense,
}
IMPLEMENTATIONS = (None, *_MIXTURES)

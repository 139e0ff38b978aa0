r"""Mixtures of experts: each position's perceptron is chosen by a router.

Scores of E experts come from a softmax or a sigmoid of the router's logits. The
k best are chosen, after adding a bias that only the choice sees, and within the
best groups of experts only; their outputs are summed with their scores,

    y = c sum_{e chosen} p_e F_e(x) (+ F_shared(x)),

p_e divided by their sum if so configured. No token is ever dropped: positions
are sorted by expert and multiplied in ragged groups, or in `tiles`. Over a mesh,
each device has the experts of its share of axis `expert`, sees the positions of
all of that axis, and adds up what its experts make of them.

The router's balance loss E sum_e f_e P_e (arXiv:2101.03961, eq. 4), f_e choices
of expert e a position and P_e its mean score, is k where all are used alike.
"""

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
from dllm_jax.models import tiles
from dllm_jax.models.layers import scaled_normal
from dllm_jax.models.perceptron import SwiGLU

ROUTERS = ("softmax", "sigmoid")
IMPLEMENTATIONS = (None, "ragged", "tiled", "dense")


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


class Experts(nn.Module):
  """A routed perceptron, called as those of `perceptron` are."""

  config: Any

  @nn.compact
  def __call__(self, x: Float[Array, "B T D"], real: Bool[Array, "B T"]):
    """Returns the mixture, the balance loss and each expert's share of choices.

    Args:
      x: normalised hidden states.
      real: False at padding, which counts in neither.
    """
    c = self.config
    scores, bias = _Router(c, name="router")(x)
    chosen = choose(
      lax.stop_gradient(scores) + bias,
      count=c.experts_per_token,
      groups=c.router_groups,
      top_groups=c.router_top_groups,
    )
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if c.router_normalised:
      # As the originals: all scores of a position can underflow to 0.
      weights /= jnp.sum(weights, axis=-1, keepdims=True) + 1e-20
    weights *= c.router_scale
    kernels = _Kernels(c, name="experts")()
    y = _divided(x.astype(c.dtype), chosen, weights, kernels, c)
    if c.shared_dim:
      y += SwiGLU(c, c.shared_dim, name="shared")(x, real)[0]
    return y, _report(scores, chosen, real)


class _Router(nn.Module):
  """Scores of the experts in float32, and what is added to choose."""

  config: Any

  @nn.compact
  def __call__(self, x):
    c = self.config
    shape = (c.width, c.experts)
    kernel = self.param("kernel", scaled_normal(), shape)
    logits = x.astype(jnp.float32) @ kernel.astype(jnp.float32)
    scores = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}[c.router]
    bias = jnp.zeros(())
    if c.router_bias:
      zeros = nn.initializers.zeros
      bias = self.param("expert_bias", zeros, (c.experts,))
      bias = bias.astype(jnp.float32)
    return scores(logits), bias


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


def _divided(x, chosen, weights, kernels, config):
  """Returns the mixture, over the mesh if there is one."""
  mesh = jax.sharding.get_abstract_mesh()
  mix = {"ragged": _ragged, "tiled": tiles.mixture, "dense": _dense}[
    _implementation(config)
  ]
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

  here = jax.P(rows, context, None)
  return jax.shard_map(
      local,
      in_specs=(
          here, here, here,
          jax.P(expert, None, tensor),
          jax.P(expert, None, tensor),
          jax.P(expert, tensor, None),
      ),
      out_specs=here,
      check_vma=False,
  )(x, chosen, weights, *kernels)  # fmt: skip


def _implementation(config) -> str:
  # Off TPUs a ragged product is a dense one of all rows and experts.
  usual = {"tpu": "ragged", "cpu": "dense"}.get(platform(), "tiled")
  return config.experts_implementation or usual


def _dense(x, chosen, weights, kernels, first):
  """Returns the mixture by running every expert on every position."""

  def add(total, expert):
    e, gate, up, down = expert
    weight = jnp.sum(jnp.where(chosen == e, weights, 0.0), axis=-1)
    y = (nn.silu(x @ gate) * (x @ up)) @ down
    return total + y * weight[..., None].astype(y.dtype), None

  ids = first + jnp.arange(kernels[0].shape[0])
  return lax.scan(add, jnp.zeros_like(x), (ids, *kernels))[0]


def _ragged(x, chosen, weights, kernels, first):
  """Returns the mixture by sorting positions by expert."""
  gate, up, down = kernels
  here, count = gate.shape[0], chosen.shape[-1]
  flat = x.reshape(-1, x.shape[-1])
  expert = chosen.reshape(-1) - first
  mine = (expert >= 0) & (expert < here)
  expert = jnp.where(mine, expert, here)  # others' experts come last
  order = jnp.argsort(expert)
  sizes = jnp.bincount(expert, length=here + 1)[:here].astype(jnp.int32)
  source = order // count
  rows = flat[source]
  product = lambda a, b: lax.ragged_dot(a, b, sizes)
  y = product(nn.silu(product(rows, gate)) * product(rows, up), down)
  weight = weights.reshape(-1)[order].astype(y.dtype)
  y = jnp.where(mine[order, None], y * weight[:, None], 0)
  return jnp.zeros_like(flat).at[source].add(y).reshape(x.shape)

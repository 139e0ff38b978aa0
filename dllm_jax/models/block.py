"""The blocks that the networks share: attention, perceptrons, the trunk.

`trunk` runs from embeddings to the last norm; what comes before and after it is
each network's own. Norms and perceptrons are handed in as types. Its submodules
belong to the module that calls it, so that paths begin at the network. Layers of
one kind are one stack, `layers`; where the kind changes with depth, each run of
equal layers is a stack of its own, `run0/layers`, `run1/layers`, and so on.
"""

from collections.abc import Callable, Sequence
import itertools
from typing import Any, Literal, NamedTuple

from flax import linen as nn
from flax import struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.core.axes import (
  BATCH_AXES,
  constrain,
  CONTEXT,
  platform,
  TENSOR,
)
from dllm_jax.core.types import Denoiser, KVCache, ModelInputs
from dllm_jax.models.adapters import check_targets
from dllm_jax.models.attention.dispatch import attention, cached_attention
from dllm_jax.models.cache import fill, query_slots, write
from dllm_jax.models.layers import (
  apart,
  is_apart,
  Linear,
  modulate,
  RMSNorm,
  scaled_normal,
  stack,
  unit_rms,
)
from dllm_jax.models.rotary import rotary_tables, rotate


def denoiser(
  module: nn.Module, param_dtype: str, folded: Callable | None = None
) -> Denoiser:
  """Returns a module called as `(inputs, cache)` as two pure functions.

  Args:
    module: the network.
    param_dtype: what fresh parameters are stored in.
    folded: parameters to those that the module has; None for the same.
  """
  c = module.config
  unrolled = c.unroll >= c.layers

  def init(key, inputs):
    params = module.init({"params": key}, inputs, None)["params"]
    check_targets(params, c.adapter)
    return jax.tree.map(lambda x: x.astype(param_dtype), params)

  def apply(params, inputs, cache=None):
    key = inputs.dropout_key
    rngs = None if key is None else {"dropout": key}
    if folded is not None and not is_apart(params):
      params = folded(params)
    elif c.adapter.rank and unrolled and not (c.dropout and rngs):
      # In a loop the first layer, too, would form a gradient of its inputs. What
      # is dropped is drawn otherwise outside of one.
      params = apart(params)
    own = module.clone(apart=is_apart(params))
    return own.apply({"params": params}, inputs, cache, rngs=rngs)

  def hold(params):
    parted = {"cpu": unrolled, "tpu": False}.get(platform(), True)
    return apart(params) if parted else params

  return Denoiser(init, apply, getattr(c, "cache", None), hold, c.dtype)


@struct.dataclass
class Shared:
  """What all layers read."""

  inputs: ModelInputs
  tables: tuple[Array, Array]
  query_scale: Float[Array, "B T"] | None
  conditioning: Float[Array, "B #T C"] | None
  slots: Int[Array, "B T"] | None
  key_segments: Int[Array, "B S"]


class Run(NamedTuple):
  """Neighbouring layers of one kind, which are stacked.

  Attributes:
    name: path of the module that holds the stack; "" for the network itself.
    first: the first of these layers.
    layers: how many.
    routed: whether their perceptrons are mixtures of experts.
    each: how many of them are neighbours; None for all.
    every: layers from the first of some neighbours to the first of the next.
  """

  name: str
  first: int
  layers: int
  routed: bool
  each: int | None = None
  every: int = 0

  @property
  def numbers(self) -> tuple[int, ...]:
    """The number of each layer of the stack."""
    each = self.each or self.layers
    place = lambda i: self.first + i // each * self.every + i % each
    return tuple(map(place, range(self.layers)))


def layer_runs(routed: Sequence[bool]) -> tuple[Run, ...]:
  """Returns the stacks of layers that are, or are not, mixtures of experts."""
  runs, first = [], 0
  for kind, same in itertools.groupby(routed):
    count = len(list(same))
    runs.append(Run(f"run{len(runs)}", first, count, kind))
    first += count
  return (runs[0]._replace(name=""),) if len(runs) == 1 else tuple(runs)


def trunk(
  config: Any,
  x: Float[Array, "B T D"],
  inputs: ModelInputs,
  cache: KVCache | None,
  conditioning: Float[Array, "B #T C"] | None,
  *,
  norm: type,
  mlp: type,
  experts: type | None = None,
  apart: bool = False,
) -> tuple[Float[Array, "B T D"], KVCache | None, dict[str, Array]]:
  """Returns the hidden states after the last norm, the cache, and `aux`.

  Args:
    config: a `TransformerConfig` or `DiTConfig`.
    x: embeddings.
    inputs: what the network sees.
    cache: keys and values of all layers, written at the slots of the positions.
    conditioning: features of time and class; None for plain norms.
    norm: `(eps)` to a norm module.
    mlp: `(config)` to a perceptron module, called `(x, real) -> (y, aux)`.
    experts: the same for the layers of routed runs.
    apart: whether the parameters of each layer lie by themselves.
  """
  c = config
  x = between(x.astype(c.dtype))
  slots, key_segments = None, inputs.segment_ids
  if cache is not None:
    cache = fill(cache, inputs)
    if inputs.slot is not None:
      slots, key_segments = query_slots(inputs), cache.segment_ids
  shared = Shared(
    inputs.replace(dropout_key=None),
    rotary_tables(
      inputs.positions,
      dim=c.rotary_dim,
      theta=c.rope_theta,
      scaling=c.rope_scaling,
    ),
    c.rope_scaling.queries(inputs.positions),
    conditioning,
    slots,
    key_segments,
  )
  aux = {}
  for run in c.runs:
    numbers = None if cache is None else run.first + jnp.arange(run.layers)
    kind = experts if run.routed else mlp
    if run.name:
      blocks = _Stack(c, norm, kind, run.layers, apart, name=run.name)
    else:
      blocks = _stack(c, norm, kind, run.layers, apart)
    (x, cache), more = blocks((x, cache), shared, numbers)
    for key, value in more.items():
      aux.setdefault(key, []).append(value)
  aux = {key: jnp.concatenate(values) for key, values in aux.items()}

  x = norm(c.norm_eps, name="final_norm")(x)
  if conditioning is not None:
    change = within(_modulation(c, 2, "final_modulation")(conditioning))
    x = modulate(x, *jnp.split(change, 2, axis=-1))
  return within(x), cache, aux


def between(x):
  """Returns activations as they lie between branches: positions over `tensor` too.

  Norms, residuals and what is kept for the backward pass are then divided by all
  axes (arXiv:2205.05198, sec. 4.2.2): a branch begins with an all-gather and ends
  with a reduce-scatter where an all-reduce would be.
  """
  return constrain(x, BATCH_AXES, (CONTEXT, TENSOR), None)


def within(x):
  """Returns activations as a branch reads them, gathered once for its matrices."""
  return constrain(x, BATCH_AXES, CONTEXT, None)


def _stack(config, norm: type, mlp: type, layers: int, apart: bool):
  c = config
  blocks = stack(
    Block, layers=layers, remat=c.remat, unroll=c.unroll, apart=apart
  )
  return blocks((c, norm, mlp), name="layers")


class _Stack(nn.Module):
  """A stack of layers under a name of its own."""

  config: Any
  norm: type
  mlp: type
  layers: int
  apart: bool

  @nn.compact
  def __call__(self, carry, shared: Shared, numbers):
    blocks = _stack(self.config, self.norm, self.mlp, self.layers, self.apart)
    return blocks(carry, shared, numbers)


def _modulation(config, parts: int, name: str) -> Linear:
  """Returns the adaLN-zero map: all changes are zero at first."""
  return Linear(
    (config.cond_dim,),
    (parts * config.width,),
    bias=True,
    dtype=config.dtype,
    kernel_init=nn.initializers.zeros,
    name=name,
  )


class Block(nn.Module):
  """x + attention(norm(x)), then x + mlp(norm(x)); adaptive if conditioned."""

  config: Any
  norm: type
  mlp: type

  @nn.compact
  def __call__(self, carry, shared: Shared, layer):
    """Returns (x, the cache) and what this layer's experts report.

    Args:
      carry: the same, from the layer before; no cache is None.
      shared: what all layers read.
      layer: this one's number in the cache; None without one.
    """
    c = self.config
    x, cache = carry
    dropout = nn.Dropout(c.dropout, deterministic=not self.has_rng("dropout"))
    attend = Attention(c, name="attention")
    mlp = self.mlp(c, name="mlp")
    attention_norm = self.norm(c.norm_eps, name="attention_norm")
    mlp_norm = self.norm(c.norm_eps, name="mlp_norm")
    if shared.conditioning is None:
      y, cache = attend(within(attention_norm(x)), shared, cache, layer)
      x = between(x + dropout(y))
      y, aux = mlp(within(mlp_norm(x)), shared.inputs.segment_ids > 0)
      return (between(x + dropout(y)), cache), aux
    # Divided by rows, like what it changes; of itself by features, as its kernel.
    change = within(_modulation(c, 6, "modulation")(shared.conditioning))
    shift, scale, gate, *second = jnp.split(change, 6, axis=-1)
    y = within(modulate(attention_norm(x), shift, scale))
    y, cache = attend(y, shared, cache, layer)
    x = between(x + gate * dropout(y))
    shift, scale, gate = second
    y = within(modulate(mlp_norm(x), shift, scale))
    y, aux = mlp(y, shared.inputs.segment_ids > 0)
    return (between(x + gate * dropout(y)), cache), aux


class Attention(nn.Module):
  """Projects, rotates, attends to the cache if there is one, projects back."""

  config: Any

  @nn.compact
  def __call__(self, x, shared: Shared, cache: KVCache | None, layer):
    """Returns the mixed values and the cache with this layer written."""
    c = self.config
    inputs = shared.inputs
    q, k, v = projected(c, c.kv_heads, c.head_dim, x, shared.tables)
    if shared.query_scale is not None:
      q *= shared.query_scale[:, :, None, None].astype(q.dtype)
    if inputs.raised is not None:
      q, k = with_raised(q, k, inputs.raised)
    if cache is not None:
      cache = write(cache, layer, k, v, inputs.slot)
    how = dict(
      mask=inputs.mask,
      q_segments=inputs.segment_ids,
      k_segments=shared.key_segments,
      q_slots=shared.slots,
      extra=inputs.extra_mask,
      implementation=c.attention,
      context=c.context,
    )
    if cache is not None and inputs.slot is not None:
      y = cached_attention(q, cache, layer, **how)
    else:
      y = attention(q, k, v, **how)
    return projected_back(c, c.head_dim, y), cache


def with_raised(
  q: Float[Array, "B T H K"], k: Float[Array, "B T G K"], raised: Array
) -> tuple[Array, Array]:
  """Returns queries and keys of a feature more, whose scores have r_q r_k added.

  With q' = [q s, r s K^1/2] and k' = [k, r], s^2 = (K + 1) / K, scores
  q' k' / (K + 1)^1/2 are q k / K^1/2 + r_q r_k: no array of all pairs is made.
  """
  width = q.shape[-1]
  scale = ((width + 1) / width) ** 0.5

  def more(x, gain):
    own = jnp.broadcast_to(gain * raised[..., None, None], (*x.shape[:3], 1))
    return jnp.concatenate([x, own.astype(x.dtype)], axis=-1)

  return more(q * scale, scale * width**0.5), more(k, 1.0)


def projected(
  config: Any,
  kv_heads: int,
  head_dim: int,
  x: Float[Array, "B T D"],
  tables: tuple[Array, Array],
  *,
  values: Literal["own", "keys"] = "own",
  unit_values: bool = False,
  scaled: bool = True,
) -> tuple[Array, Array, Array]:
  """Returns rotated queries and keys, and values, `[B, T, heads, head_dim]`.

  Its submodules are those of the module that calls it.

  Args:
    config: the network's.
    kv_heads: key and value heads.
    head_dim: features of a head.
    x: normalised hidden states.
    tables: cosines and sines.
    values: whether values have a projection of their own, or are the keys before
      their norm.
    unit_values: whether values are divided by their root mean square.
    scaled: whether scores are to be divided by sqrt(head_dim), which `attention`
      does; else queries are multiplied by it, in their norm.
  """
  c = config

  def project(name, heads):
    return Linear(
      (c.width,),
      (heads, head_dim),
      bias=c.qkv_bias,
      dtype=c.dtype,
      adapter=c.adapter,
      matmul=c.matmul,
      name=name,
    )(x)

  q, k = project("q", c.heads), project("k", kv_heads)
  v = k if values == "keys" else project("v", kv_heads)
  if unit_values:
    v = unit_rms(v, c.norm_eps).astype(v.dtype)
  if c.qk_norm:
    gain = 1.0 if scaled else head_dim**0.5
    q = RMSNorm(c.norm_eps, gain, name="q_norm")(q)
    k = RMSNorm(c.norm_eps, name="k_norm")(k)
  return rotate(q, tables), rotate(k, tables), v


def projected_back(
  config: Any, head_dim: int, y: Float[Array, "B T H K"]
) -> Float[Array, "B T D"]:
  """Returns what attention mixed, in the features of a position."""
  out = Linear(
    (config.heads, head_dim),
    (config.width,),
    dtype=config.dtype,
    kernel_init=scaled_normal((2 * config.layers) ** -0.5),
    adapter=config.adapter,
    matmul=config.matmul,
    name="o",
  )
  return out(y)

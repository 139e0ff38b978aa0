"""Attention over positions that are divided between devices (axis `context`).

Each device keeps its own queries and meets the keys of all. With "all_gather"
it fetches them at once; with "ring" they travel from device to device
(arXiv:2310.01889) while the ones that are there are attended to, and no device
holds more than two shards. Left to itself the compiler gathers too, but then
forms and keeps the scores of all keys; here both ways walk over pieces of keys
under one online softmax (arXiv:2205.14135), form scores again in the backward
pass, and skip pieces that the mask leaves empty.

    device   0      1      2      3
    turn 0   k0 v0  k1 v1  k2 v2  k3 v3     ring: after each turn everything
    turn 1   k3 v3  k0 v0  k1 v1  k2 v2     moves one device on; gradients of
    turn 2   k2 v2  k3 v3  k0 v0  k1 v1     keys travel with them, and are home
    turn 3   k1 v1  k2 v2  k3 v3  k0 v0     after the last turn
"""

from collections.abc import Callable
import functools
from typing import Any, Literal, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dllm_jax.core.axes import axis_size, BATCH_AXES, CONTEXT, TENSOR
from dllm_jax.core.mask import MaskSpec, materialise
from dllm_jax.models.attention.scores import (
  from_heads,
  MASKED,
  mix,
  row_max,
  row_sum,
  scores,
  to_heads,
)

STRATEGIES = ("all_gather", "ring")
Strategy = Literal["all_gather", "ring"]

# Keys that are scored at once: [T, 1024] float32 scores a head, not [T, S].
_PIECE = 1024


class _Keys(NamedTuple):
  """Keys and values in pieces, `[pieces, B, S, G, K]`, and their segments."""

  k: Float[Array, "P B S G K"]
  v: Float[Array, "P B S G K"]
  segments: Int[Array, "P B S"]


def divides(length: int) -> bool:
  """Returns whether positions lie on several devices, in equal shares."""
  shards = axis_size(CONTEXT)
  return shards > 1 and length % shards == 0


def placed(run: Callable[..., Array]) -> Callable[..., Array]:
  """Returns run(q, k, v, q_segments, k_segments) on each device's own share.

  Rows, positions and heads are divided over their axes of the mesh; those that
  do not divide are left whole.
  """

  def call(q, k, v, q_segments, k_segments):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
      return run(q, k, v, q_segments, k_segments)
    rows = tuple(a for a in BATCH_AXES if a in mesh.shape)
    rows = rows if q.shape[0] % axis_size(*rows) == 0 else None
    tensor = TENSOR if TENSOR in mesh.shape else None
    tensor = tensor if k.shape[2] % axis_size(TENSOR) == 0 else None
    context = CONTEXT if divides(q.shape[1]) else None
    here, segments = jax.P(rows, context, tensor), jax.P(rows, context)
    return jax.shard_map(
      run,
      in_specs=(here, here, here, segments, segments),
      out_specs=here,
      check_vma=False,
    )(q, k, v, q_segments, k_segments)

  return call


def attention(q, k, v, spec, q_segments, k_segments, *, strategy: Strategy):
  """Returns attention; arguments as in `attention.attention`, T equal to S."""
  run = functools.partial(_attend, spec, strategy)
  return placed(run)(q, k, v, q_segments, k_segments)


def all_keys(*arrays: Array) -> tuple[Array, ...]:
  """Returns `[B, S, ...]` of all devices from their shards, inside `placed`."""
  return tuple(lax.all_gather(x, CONTEXT, axis=1, tiled=True) for x in arrays)


def first_slot(length: int) -> Int[Array, ""]:
  """Returns the slot of a shard's first position, inside `placed`."""
  return lax.axis_index(CONTEXT) * length


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(spec, strategy, q, k, v, q_segments, k_segments):
  return _forward(spec, strategy, q, k, v, q_segments, k_segments)[0]


def _forward(spec, strategy, q, k, v, q_segments, k_segments):
  """Returns the mixed values of local queries, and what gradients need."""
  keys = _pieces(k, v, k_segments)
  batch, length, heads, width = q.shape
  shape = (batch, k.shape[2], heads // k.shape[2], length)
  state = (
    jnp.full((*shape, 1), MASKED),
    jnp.zeros((*shape, 1), jnp.float32),
    jnp.zeros((*shape, width), jnp.float32),
  )

  def visit(state, piece, allowed):
    top, total, mixed = state
    s = scores(q, piece.k, allowed)
    new = jnp.maximum(top, row_max(s))
    p, shrink = jnp.exp(s - new), jnp.exp(top - new)
    total = total * shrink + row_sum(p)
    return (new, total, mixed * shrink + mix(p, piece.v)), None

  sweep = functools.partial(_sweep, spec, q_segments, visit)
  if strategy == "all_gather":
    state, _ = sweep(state, _gathered(keys), 0)
  else:

    def turn(carry, step):
      state, keys = carry
      moved = _pass_on(keys)  # while the ones that are here are attended to
      return (sweep(state, keys, _origin(step, k.shape[1]))[0], moved), None

    turns = axis_size(CONTEXT) - 1
    (state, keys), _ = lax.scan(turn, (state, keys), jnp.arange(turns))
    state, _ = sweep(state, keys, _origin(turns, k.shape[1]))
  top, total, mixed = state
  out = to_heads((mixed / total).astype(q.dtype))
  saved = (q, k, v, q_segments, k_segments, out, top + jnp.log(total))
  return out, saved


def _backward(spec, strategy, saved, d_out):
  """Returns the gradients of local queries, keys and values.

  With N = sum_j exp(s_j - lse) v_j, Z = sum_j exp(s_j - lse) and out = N / Z,
  where Z = 1: d out = dN - out dZ, so a piece's part of N has the cotangent
  d_out and its part of Z has -(d_out . out).
  """
  q, k, v, q_segments, k_segments, out, lse = saved
  groups = k.shape[2]
  d_mixed = from_heads(d_out, groups).astype(jnp.float32)
  d_total = -row_sum(d_mixed * from_heads(out, groups).astype(jnp.float32))

  def visit(d_q, piece, allowed):
    def parts(q, k, v):
      p = jnp.exp(scores(q, k, allowed) - lse)
      return mix(p, v), row_sum(p)

    more, *d_keys = jax.vjp(parts, q, piece.k, piece.v)[1]((d_mixed, d_total))
    return d_q + more, tuple(d.astype(jnp.float32) for d in d_keys)

  sweep = functools.partial(_sweep, spec, q_segments, visit)
  keys = _pieces(k, v, k_segments)
  d_q = jnp.zeros(q.shape, jnp.float32)
  if strategy == "all_gather":
    d_q, d_keys = sweep(d_q, _gathered(keys), 0)
    d_keys = jax.tree.map(
      lambda d: lax.psum_scatter(d, CONTEXT, scatter_dimension=0, tiled=True),
      d_keys,
    )
  else:

    def turn(carry, step):
      d_q, keys, d_keys = carry
      d_q, more = sweep(d_q, keys, _origin(step, k.shape[1]))
      d_keys = _pass_on(jax.tree.map(jnp.add, d_keys, more))
      return (d_q, _pass_on(keys), d_keys), None

    turns = axis_size(CONTEXT) - 1
    zeros = jnp.zeros(keys.k.shape, jnp.float32)
    carry = (d_q, keys, (zeros, zeros))
    (d_q, keys, d_keys), _ = lax.scan(turn, carry, jnp.arange(turns))
    d_q, more = sweep(d_q, keys, _origin(turns, k.shape[1]))
    d_keys = _pass_on(jax.tree.map(jnp.add, d_keys, more))
  d_k, d_v = (
    jnp.moveaxis(d, 0, 1).reshape(k.shape).astype(k.dtype) for d in d_keys
  )
  return d_q.astype(q.dtype), d_k, d_v, None, None


_attend.defvjp(_forward, _backward)


def _pieces(k, v, segments) -> _Keys:
  length = k.shape[1]
  size = min(length, _PIECE)
  while length % size:
    size -= 1

  def cut(x):
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

  return _Keys(cut(k), cut(v), cut(segments))


def _gathered(keys: _Keys) -> _Keys:
  return jax.tree.map(
    lambda x: lax.all_gather(x, CONTEXT, axis=0, tiled=True), keys
  )


def _pass_on(tree: Any) -> Any:
  """Returns what the device before this one had."""
  n = axis_size(CONTEXT)
  ring = [(i, (i + 1) % n) for i in range(n)]
  return jax.tree.map(lambda x: lax.ppermute(x, CONTEXT, ring), tree)


def _origin(step, length: int) -> Int[Array, ""]:
  """Returns the first slot of the keys that are here after so many turns."""
  n = axis_size(CONTEXT)
  return (lax.axis_index(CONTEXT) - step) % n * length


def _sweep(spec: MaskSpec, q_segments, visit, state, keys: _Keys, first):
  """Returns visit's state and outputs after all pieces, empty ones skipped."""
  length, size = q_segments.shape[1], keys.k.shape[2]
  slots = first_slot(length) + jnp.arange(length)

  def body(state, numbered):
    i, piece = numbered
    allowed = materialise(
      spec,
      slots,
      first + i * size + jnp.arange(size),
      q_segments=q_segments,
      k_segments=piece.segments,
    )
    run = lambda state: visit(state, piece, allowed[:, None, None])
    nothing = jax.eval_shape(run, state)[1]
    skip = lambda state: (
      state,
      jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), nothing),
    )
    return lax.cond(jnp.any(allowed), run, skip, state)

  return lax.scan(body, state, (jnp.arange(keys.k.shape[0]), keys))

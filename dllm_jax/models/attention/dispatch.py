"""Attention: one function, an XLA reference, and faster kernels by name.

The mask is a small spec (`dllm_jax.core.mask`) with segment ids; the reference
turns it into one boolean array a row, kernels get the spec itself where they
can. The two-stream mask of block diffusion is attended in two parts, so that no
2L x 2L score matrix exists. Where the mesh divides positions, `context` says how
queries meet the keys of other devices. No parameters here.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.core.mask import (
  BlockCausal,
  Causal,
  Full,
  MaskSpec,
  materialise,
  TwoStream,
)
from dllm_jax.core.types import KVCache
from dllm_jax.models import attention as kernels
from dllm_jax.models.attention import context as divided
from dllm_jax.models.attention.scores import (
  mix,
  row_max,
  row_sum,
  scores,
  to_heads,
)
from dllm_jax.models.cache import read

IMPLEMENTATIONS = (None, "xla", "cudnn", "flash", "splash")
Implementation = Literal["xla", "cudnn", "flash", "splash"] | None

# The reference scores some hundred queries at a time above so many scores a head.
_SCORES, _PIECE = 2048**2, 512


def check_implementation(
  name: str | None, context: divided.Strategy = "all_gather"
) -> None:
  """Raises ValueError unless `attention` knows both and can join them."""
  if name not in IMPLEMENTATIONS:
    raise ValueError(
      f"attention implementation {name!r} is unknown; choose one of"
      f" {', '.join(map(str, IMPLEMENTATIONS))}"
    )
  if context not in divided.STRATEGIES:
    raise ValueError(
      f"context {context!r} is unknown; choose one of"
      f" {', '.join(divided.STRATEGIES)}"
    )
  if context == "ring" and name in ("cudnn", "flash", "splash"):
    raise ValueError(
      f"attention {name!r} needs all keys at once: take context 'all_gather',"
      " or attention 'xla' for 'ring'"
    )


def attention(
  q: Float[Array, "B T H K"],
  k: Float[Array, "B S G K"],
  v: Float[Array, "B S G K"],
  *,
  mask: MaskSpec,
  q_segments: Int[Array, "B T"],
  k_segments: Int[Array, "B S"],
  q_slots: Int[Array, "*B T"] | None = None,
  extra: Bool[Array, "*B T S"] | None = None,
  implementation: Implementation = None,
  context: divided.Strategy = "all_gather",
) -> Float[Array, "B T H K"]:
  """Returns softmax(q k^T / sqrt(K)) v over the keys that each query may see.

  Args:
    q: rotated queries; H is a multiple of G, head h reads group h // (H / G).
    k: rotated keys.
    v: values.
    mask: who attends to whom, by slot; key j is in slot j.
    q_segments: the segment of each query; a query sees its own segment only.
    k_segments: the segment of each key; 0 hides it from every real query.
    q_slots: the slot of each query, `[T]` or `[B, T]`; None for 0 .. T-1.
    extra: a further mask, True = may attend, or None.
    implementation: None or "xla" for the reference; "cudnn" (NVIDIA GPU, 16-bit
      inputs) for rows of one segment under `Full` and `Causal`, and for other
      rows and masks as "flash", the kernel of tiles (`flash`, GPU); "splash"
      (TPU, no cache and no extra mask, T a multiple of 128). With slots of their own
      or an extra mask, "cudnn" is given an array of it, and "flash" the reference.
    context: how keys come from other devices where the mesh divides positions,
      "all_gather" or "ring" ("xla" only): `dllm_jax.models.context`.

  Returns:
    The mixed values, in the type of q. Rows of padded queries are finite and
    mean nothing.

  Raises:
    ValueError: for an unknown implementation, or inputs that it cannot take.
  """
  check_implementation(implementation, context)
  whole = q_slots is None and extra is None
  if implementation == "splash":
    if not whole:
      raise ValueError(
        "attention 'splash' takes no cache and no extra mask; use 'xla'"
      )
    return kernels.splash.attention(q, k, v, mask, q_segments, k_segments)
  if whole and implementation in ("cudnn", "flash"):
    one = implementation == "cudnn" and isinstance(mask, Full | Causal)
    if one and not divided.divides(q.shape[1]):
      run = functools.partial(_by_lengths, mask)
      return divided.placed(run)(q, k, v, q_segments, k_segments)
    return kernels.flash.attention(q, k, v, mask, q_segments, k_segments)
  if whole and divided.divides(q.shape[1]):
    return divided.attention(
      q, k, v, mask, q_segments, k_segments, strategy=context
    )
  if whole and isinstance(mask, TwoStream):
    return _two_stream(q, k, v, mask, q_segments, k_segments)
  slots = jnp.arange(q.shape[1]) if q_slots is None else q_slots
  segments = q_segments, k_segments
  if implementation == "cudnn":
    allowed = _allowed(mask, k.shape[1], segments, slots, extra)
    return jax.nn.dot_product_attention(
      q, k, v, mask=allowed[:, None], implementation="cudnn"
    )
  return _by_queries(q, k, v, mask, segments, slots, extra)


def cached_attention(
  q: Float[Array, "B T H K"],
  cache: KVCache,
  layer: Int[Array, ""],
  *,
  mask: MaskSpec,
  q_segments: Int[Array, "B T"],
  k_segments: Int[Array, "B S"],
  q_slots: Int[Array, "B T"],
  extra: Bool[Array, "*B T S"] | None = None,
  implementation: Implementation = None,
  context: divided.Strategy = "all_gather",
) -> Float[Array, "B T H K"]:
  """Returns attention to a layer of a cache, which has the queries' own keys.

  On a GPU "cudnn" and "flash" read it where it lies (`kept`); everything else reads
  a copy of the layer.

  Args:
    q: rotated queries.
    cache: of all layers.
    layer: the layer's number.
    mask: as of `attention`, and so are the others.
    q_segments: the segment of each query.
    k_segments: the segment of each slot.
    q_slots: the slot of each query.
    extra: a further mask, or None.
    implementation: of attention.
    context: how keys come from other devices.

  Raises:
    ValueError: as of `attention`.
  """
  who = dict(
    mask=mask, q_segments=q_segments, k_segments=k_segments, q_slots=q_slots
  )
  kernel = kernels.kept
  if (
    kernel.chosen(implementation) and extra is None and kernel.fits(cache, mask)
  ):
    return kernel.attention(q, cache, layer, **who)
  k, v = read(cache, layer, q.dtype)
  return attention(
    q, k, v, **who, extra=extra, implementation=implementation, context=context
  )


def _allowed(mask, length, segments, slots, extra):
  q_segments, k_segments = segments
  return materialise(
    mask,
    slots,
    jnp.arange(length),
    q_segments=q_segments,
    k_segments=k_segments,
    extra=extra,
  )


def _by_queries(q, k, v, mask, segments, slots, extra):
  """Returns attention of some hundred queries at a time, where there are many.

  The scores of one piece are there at once, and again in the backward pass.
  """
  q_segments, k_segments = segments
  length = q.shape[1]
  size = length
  if length * k.shape[1] > _SCORES:
    size = next(n for n in range(_PIECE, 0, -1) if length % n == 0)

  def piece(q, q_segments, slots, extra):
    segments = q_segments, k_segments
    allowed = _allowed(mask, k.shape[1], segments, slots, extra)
    s = scores(q, k, allowed[:, None, None])
    p = jnp.exp(s - row_max(s))
    return to_heads((mix(p, v) / row_sum(p)).astype(q.dtype))

  if size == length:
    return piece(q, q_segments, slots, extra)

  def cut(x, axis):
    shape = (*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)

  cuts = (cut(q, 1), cut(q_segments, 1), cut(slots, slots.ndim - 1))
  if extra is not None:
    cuts = (*cuts, cut(extra, extra.ndim - 2))
  step = jax.checkpoint(lambda x: piece(*x, *[None] * (4 - len(x))))
  return jnp.moveaxis(jax.lax.map(step, cuts), 0, 1).reshape(q.shape)


def _by_lengths(mask, q, k, v, q_segments, k_segments):
  """Returns attention of rows that are one segment and padding, by lengths.

  Whether they are is known when they are here: rows that hold several segments
  go to the kernel of tiles. A row of padding is given one key, so that it stays
  finite.
  """
  lengths = jnp.sum(k_segments > 0, axis=1, dtype=jnp.int32)
  alone = jnp.arange(k.shape[1]) < lengths[:, None]
  alone = jnp.all(alone == k_segments) & jnp.all(q_segments <= 1)

  def one():
    return jax.nn.dot_product_attention(
      q,
      k,
      v,
      is_causal=isinstance(mask, Causal),
      key_value_seq_lengths=jnp.maximum(lengths, 1),
      implementation="cudnn",
    )

  several = lambda: kernels.flash.here(mask, q, k, v, q_segments, k_segments)
  return jax.lax.cond(alone, one, several)


def _two_stream(q, k, v, mask, q_segments, k_segments):
  """Returns attention on [z ; x0] in two parts (arXiv:2503.09573, eq. 6).

  Clean to clean is block-causal, by its own blocks. Noisy attends to the noisy keys of its own
  block and to the clean keys of earlier blocks under one softmax, whose maximum
  and sum join the two.
  """
  length, block = mask.length, mask.block
  if q.shape[1] != 2 * length or k.shape[1] != 2 * length:
    raise ValueError(
      f"a two-stream mask of length {length} needs {2 * length} positions,"
      f" not {q.shape[1]}: pass [z ; x0]"
    )
  noisy, clean = slice(None, length), slice(length, None)
  out_clean = attention(
    q[:, clean],
    k[:, clean],
    v[:, clean],
    mask=BlockCausal(mask.clean_block or block),
    q_segments=q_segments[:, clean],
    k_segments=k_segments[:, clean],
  )

  blocks = jnp.arange(length) // block
  past = blocks[:, None] > blocks[None, :]
  past &= q_segments[:, noisy, None] == k_segments[:, None, clean]
  past_scores = scores(q[:, noisy], k[:, clean], past[:, None, None])

  # Own blocks become rows: [B * L / block, block, heads, K].
  own_q, own_k, own_v, own_qs, own_ks = (
    x[:, noisy].reshape(-1, block, *x.shape[2:])
    for x in (q, k, v, q_segments, k_segments)
  )
  own = own_qs[:, :, None] == own_ks[:, None, :]
  own_scores = scores(own_q, own_k, own[:, None, None])

  batch = q.shape[0]

  def to_rows(x):  # [B, G, R, L, n] to [B * L / block, G, R, block, n]
    x = x.reshape(*x.shape[:3], length // block, block, x.shape[-1])
    return jnp.moveaxis(x, 3, 1).reshape(-1, *x.shape[1:3], *x.shape[4:])

  def from_rows(x):
    x = x.reshape(batch, length // block, *x.shape[1:])
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(*x.shape[:3], length, x.shape[-1])

  top = jnp.maximum(row_max(past_scores), from_rows(row_max(own_scores)))
  past_p = jnp.exp(past_scores - top)
  own_p = jnp.exp(own_scores - to_rows(top))
  mixed = mix(past_p, v[:, clean]) + from_rows(mix(own_p, own_v))
  total = row_sum(past_p) + from_rows(row_sum(own_p))
  out_noisy = to_heads((mixed / total).astype(q.dtype))
  return jnp.concatenate([out_noisy, out_clean], axis=1)

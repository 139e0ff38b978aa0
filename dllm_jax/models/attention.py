"""Attention: one function, an XLA reference, and faster kernels by name.

The mask is a small spec (`dllm_jax.core.mask`) with segment ids; the reference
turns it into one boolean array a row, kernels get the spec itself where they
can. Softmax is float32 everywhere, grouped keys and values are never repeated,
and the two-stream mask of block diffusion is attended in two parts, so that no
2L x 2L score matrix exists. No parameters here.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dllm_jax.core.mask import BlockCausal, MaskSpec, materialise, TwoStream
from dllm_jax.models import splash

IMPLEMENTATIONS = (None, "xla", "cudnn", "splash")
Implementation = Literal["xla", "cudnn", "splash"] | None

# Finite, so that a row without any allowed key gives numbers and not NaN.
_MASKED = -1e30


def check_implementation(name: str | None) -> None:
  """Raises ValueError unless `attention` knows the implementation."""
  if name not in IMPLEMENTATIONS:
    raise ValueError(
      f"attention implementation {name!r} is unknown; choose one of"
      f" {', '.join(map(str, IMPLEMENTATIONS))}"
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
      inputs); "splash" (TPU, no cache and no extra mask, T a multiple of 128).

  Returns:
    The mixed values, in the type of q. Rows of padded queries are finite and
    mean nothing.

  Raises:
    ValueError: for an unknown implementation, or inputs that it cannot take.
  """
  check_implementation(implementation)
  whole = q_slots is None and extra is None
  if implementation == "splash":
    if not whole:
      raise ValueError(
        "attention 'splash' takes no cache and no extra mask; use 'xla'"
      )
    return splash.attention(q, k, v, mask, q_segments, k_segments)
  if implementation != "cudnn" and whole and isinstance(mask, TwoStream):
    return _two_stream(q, k, v, mask, q_segments, k_segments)
  slots = jnp.arange(q.shape[1]) if q_slots is None else q_slots
  allowed = materialise(
    mask,
    slots,
    jnp.arange(k.shape[1]),
    q_segments=q_segments,
    k_segments=k_segments,
    extra=extra,
  )
  if implementation == "cudnn":
    return jax.nn.dot_product_attention(
      q, k, v, mask=allowed[:, None], implementation="cudnn"
    )
  scores = _scores(q, k, allowed[:, None, None])
  p = jnp.exp(scores - _row_max(scores))
  return _divide(_mix(p, v), _row_sum(p), q)


def _row_max(scores):
  # Any shift leaves the result alone, so no gradient goes through it.
  return jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))


def _row_sum(p):
  return jnp.sum(p, axis=-1, keepdims=True)


def _scores(q, k, allowed) -> Float[Array, "B G R T S"]:
  """Returns scaled float32 scores, `_MASKED` where not allowed.

  The R query heads of a group are stacked as rows of one matrix product.
  """
  batch, length, heads, width = q.shape
  groups = k.shape[2]
  q = (q * width**-0.5).reshape(batch, length, groups, -1, width)
  q = jnp.transpose(q, (0, 2, 3, 1, 4)).reshape(batch, groups, -1, width)
  scores = jnp.einsum(
    "bgnk,bgsk->bgns",
    q,
    jnp.swapaxes(k, 1, 2),
    preferred_element_type=jnp.float32,
  )
  scores = scores.reshape(batch, groups, heads // groups, length, -1)
  return jnp.where(allowed, scores, _MASKED)


def _mix(p, v) -> Float[Array, "B G R T K"]:
  batch, groups, repeat, length, _ = p.shape
  mixed = jnp.einsum(
    "bgns,bgsk->bgnk",
    p.astype(v.dtype).reshape(batch, groups, repeat * length, -1),
    jnp.swapaxes(v, 1, 2),
    preferred_element_type=jnp.float32,
  )
  return mixed.reshape(batch, groups, repeat, length, -1)


def _divide(mixed, total, q) -> Float[Array, "B T H K"]:
  out = (mixed / total).astype(q.dtype)
  return jnp.transpose(out, (0, 3, 1, 2, 4)).reshape(q.shape)


def _two_stream(q, k, v, mask, q_segments, k_segments):
  """Returns attention on [z ; x0] in two parts (arXiv:2503.09573, eq. 6).

  Clean to clean is block-causal. Noisy attends to the noisy keys of its own
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
    mask=BlockCausal(block),
    q_segments=q_segments[:, clean],
    k_segments=k_segments[:, clean],
  )

  blocks = jnp.arange(length) // block
  past = blocks[:, None] > blocks[None, :]
  past &= q_segments[:, noisy, None] == k_segments[:, None, clean]
  past_scores = _scores(q[:, noisy], k[:, clean], past[:, None, None])

  # Own blocks become rows: [B * L / block, block, heads, K].
  own_q, own_k, own_v, own_qs, own_ks = (
    x[:, noisy].reshape(-1, block, *x.shape[2:])
    for x in (q, k, v, q_segments, k_segments)
  )
  own = own_qs[:, :, None] == own_ks[:, None, :]
  own_scores = _scores(own_q, own_k, own[:, None, None])

  batch = q.shape[0]

  def to_rows(x):  # [B, G, R, L, n] to [B * L / block, G, R, block, n]
    x = x.reshape(*x.shape[:3], length // block, block, x.shape[-1])
    return jnp.moveaxis(x, 3, 1).reshape(-1, *x.shape[1:3], *x.shape[4:])

  def from_rows(x):
    x = x.reshape(batch, length // block, *x.shape[1:])
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(*x.shape[:3], length, x.shape[-1])

  top = jnp.maximum(_row_max(past_scores), from_rows(_row_max(own_scores)))
  past_p = jnp.exp(past_scores - top)
  own_p = jnp.exp(own_scores - to_rows(top))
  mixed = _mix(past_p, v[:, clean]) + from_rows(_mix(own_p, own_v))
  total = _row_sum(past_p) + from_rows(_row_sum(own_p))
  out_noisy = _divide(mixed, total, q[:, noisy])
  return jnp.concatenate([out_noisy, out_clean], axis=1)

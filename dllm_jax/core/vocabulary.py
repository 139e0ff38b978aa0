r"""Reductions over the vocabulary that never build `[B, T, V]`.

Logits of a whole batch are the memory wall of the field (38 GB for LLaDA at
32 x 1024). Everything that needs them goes through one of two functions, which
form logits on chunks of positions: `reduce` for any function of a chunk (draws,
confidences, KL terms), and `cross_entropy`, the hot path of training, which also
forms its gradients in the forward pass. Nothing else multiplies by the
unembedding.
"""

from collections.abc import Callable
import functools

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from dllm_jax.core import axes
from dllm_jax.core.axes import axis_size, BATCH_AXES, CONTEXT, folded, platform
from dllm_jax.core.types import ModelOutputs

# A chunk has about this many logits on a device (16 MiB in float32), but no
# fewer rows than keep a matrix unit busy. On CPUs, as many as stay in the cache
# from one step of a draw to the next.
_CHUNK = (2**22, 256)
_CPU_CHUNK = (2**21, 64)


def _chunk_rows(vocab: int) -> int:
  elements, least = _CPU_CHUNK if platform() == "cpu" else _CHUNK
  return max(least, elements // vocab)


def chunks(positions: int, vocab: int) -> int:
  """Returns into how many chunks `cross_entropy` cuts a device's positions."""
  return -(-positions // min(_chunk_rows(vocab), positions))


def vocab_width(out: ModelOutputs) -> int:
  """Returns the number of logits a position has, padding included."""
  return (out.hidden if out.unembed is None else out.unembed).shape[-1]


def forbid(out: ModelOutputs, token: int | None) -> ModelOutputs:
  """Returns outputs under which a token has probability zero.

  Through the bias, so that no chunk needs another pass: SUBS's "zero masking
  probability" (arXiv:2406.07524, sec. 3.2.3). None forbids nothing.
  """
  if token is None:
    return out
  width = vocab_width(out)
  bias = jnp.zeros((width,), jnp.float32) if out.bias is None else out.bias
  bias = jnp.where(jnp.arange(width) == token, -jnp.inf, bias)
  return out.replace(bias=bias)


def _wide(x: Array) -> Array:
  """Returns x in float32, or in float64 where it is."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _logits(
  out: ModelOutputs, table: Array | None, hidden: Array
) -> Float[Array, "*n V"]:
  """Returns logits of some hidden states, float32 at least, padding off."""
  logits = _wide(hidden)
  if table is not None:
    wide = functools.partial(jnp.matmul, preferred_element_type=logits.dtype)
    product = axes.product_with_table if out.tied else wide
    rows = hidden.astype(table.dtype)
    logits = _capped(
      axes.of_rows(lambda x: product(x, table), rows), out.softcap
    )
  if out.bias is not None:
    logits = logits + out.bias.astype(logits.dtype)
  return logits if out.vocab_size is None else logits[..., : out.vocab_size]


def _capped(logits: Array, softcap: float | None) -> Array:
  """Returns softcap tanh(logits / softcap)."""
  return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def best(logits: Float[Array, "*n V"]) -> Int[Array, "*n"]:
  """Returns the token of the largest logit, the first of equals.

  On CPUs by way of the maximum, as XLA's `argmax` is slow there (2.3 ms for 32
  rows of 32,000 logits, and 0.3 so); where there is none (NaN), the last token.
  """
  if platform() != "cpu":
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
  vocab = logits.shape[-1]
  top = folded(jnp.maximum, logits)[..., None]
  ids = jnp.where(logits == top, jnp.arange(vocab, dtype=jnp.int32), vocab - 1)
  return folded(jnp.minimum, ids)


def mean_embedding(
  out: ModelOutputs,
) -> Callable[[Float[Array, "*n V"]], Float[Array, "*n D"]]:
  """Returns `p -> p @ unembed^T`, the mean row of a table.

  What self-conditioning carries in place of probabilities. The gradient reaches
  the unembedding, not p.
  """
  table = _table(out)

  def mean(p):
    p = lax.stop_gradient(p)
    if table is None:
      return p
    # Padding gets no probability: to slice the table would copy it.
    more = vocab_width(out) - p.shape[-1]
    p = jnp.pad(p, [(0, 0)] * (p.ndim - 1) + [(0, more)])
    product = "...v,vd->...d" if out.tied else "...v,dv->...d"
    wide = p.dtype
    return jnp.einsum(
      product, p.astype(table.dtype), table, preferred_element_type=wide
    )

  return mean


def _table(out: ModelOutputs) -> Array | None:
  """Returns the unembedding as it is stored, `[V, D]` if tied.

  Made outside of loops, whose operand would else be a copy laid out the other
  way, as large as the table.
  """
  return out.unembed.T if out.tied else out.unembed  # None has no tie


def cast_unembedding(out: ModelOutputs) -> ModelOutputs:
  """Returns outputs whose unembedding is in the type that products read.

  That of the hidden states: outside of a loop of calls, each of which would cast
  it anew.
  """
  if out.unembed is None:
    return out
  table = _table(out).astype(out.hidden.dtype)
  return out.replace(unembed=table.T if out.tied else table)


def _slices(x: Array, shards: int, start: Array, size: int) -> Array:
  """Returns `size` positions of each context shard, from `start` in it."""
  batch, length, *rest = x.shape
  x = x.reshape(batch, shards, length // shards, *rest)
  x = lax.dynamic_slice_in_dim(x, start, size, axis=2)
  return x.reshape(batch, shards * size, *rest)


def reduce(
  fn: Callable[..., PyTree],
  outs: ModelOutputs | tuple[ModelOutputs, ...],
  *per_position: PyTree,
  window: Int[Array, "B W"] | None = None,
  live: int = 1,
) -> PyTree:
  """Returns fn(logits, *per_position), computed on chunks of positions.

  The batch axis stays whole, and sharded as it is: flattening positions first
  would make every device compute every chunk. Differentiable; the logits of a
  chunk are formed again in the backward pass.

  Args:
    fn: `(logits [B, c, V] float32, *chunks) -> pytree of [B, c, ...]`; a function
      of each position alone. It gets a tuple of logits if `outs` is a tuple.
    outs: the network's outputs, or several (guidance).
    *per_position: pytrees whose leaves are `[B, T, ...]`, cut like the logits, or
      `[B, 1, ...]`, handed to every chunk as they are.
    window: for each row, the slots of `hidden` to read, if not all T: results and
      `per_position` are then `[B, W, ...]`. Slots below 0 read slot 0.
    live: how many times smaller a chunk is: about the arrays of its size that the
      gradient of fn keeps at once, where `cross_entropy` keeps none.

  Returns:
    The pytree that fn returns, with all T (or W) positions.
  """
  several = isinstance(outs, tuple)
  outs = outs if several else (outs,)
  hidden = [out.hidden for out in outs]
  tables = [_table(cast_unembedding(out)) for out in outs]
  if window is not None:
    index = jnp.maximum(window, 0)[:, :, None]
    hidden = [jnp.take_along_axis(h, index, axis=1) for h in hidden]
  batch, length = hidden[0].shape[:2]
  shards = axis_size(CONTEXT)
  shards = shards if length % shards == 0 else 1
  span = length // shards
  devices = axis_size(*BATCH_AXES)
  local_rows = -(-batch // devices) * len(outs)
  size = _chunk_rows(vocab_width(outs[0])) // (local_rows * live)
  size = min(max(size, 1), span)

  leaves, treedef = jax.tree.flatten(per_position)

  def chunk(start):
    def cut(x):
      whole = x.ndim < 2 or (x.shape[1] == 1 and length > 1)
      return x if whole else _slices(x, shards, start, size)

    logits = tuple(
      _logits(out, table, cut(h))
      for out, table, h in zip(outs, tables, hidden, strict=True)
    )
    args = jax.tree.unflatten(treedef, [cut(x) for x in leaves])
    return fn(logits if several else logits[0], *args)

  chunks = -(-span // size)
  if chunks == 1:
    return chunk(0)

  # The last chunk overlaps the one before it where size does not divide span.
  def body(_, i):
    return None, jax.checkpoint(chunk, prevent_cse=False)(
      jnp.minimum(i * size, span - size)
    )

  _, parts = lax.scan(body, None, jnp.arange(chunks))

  def join(part):
    part = part.reshape(chunks, batch, shards, size, *part.shape[3:])
    part = jnp.moveaxis(part, 0, 2)  # [B, shards, chunks, size, ...]
    head = part[:, :, :-1].reshape(
      batch, shards, (chunks - 1) * size, *part.shape[4:]
    )
    tail = part[:, :, -1, chunks * size - span :]
    whole = jnp.concatenate([head, tail], axis=2)
    return whole.reshape(batch, length, *part.shape[4:])

  return jax.tree.map(join, parts)


def cross_entropy(
  out: ModelOutputs,
  targets: Int[Array, "B T"],
  weights: Float[Array, "B T"],
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
  r"""Returns the weighted sum of -log softmax(logits)[target], and each term.

  `total = sum_i w_i (logsumexp_v l_iv - l_i,target)`. Chunked; the gradients for
  `hidden`, the unembedding and the bias are formed in the forward pass, while the
  chunk's logits are at hand, so nothing is computed twice and what is kept for
  the backward pass has no vocabulary axis beside positions. On every device the
  local positions with a weight come first and chunks without any are skipped.

  Args:
    out: the network's outputs.
    targets: token ids; read only where the weight is not zero.
    weights: what each position's term is multiplied by; differentiable.

  Returns:
    `(total, per_token)`: the differentiable sum in nats, and the unweighted terms
    in nats without a gradient, 0 where the weight is 0.
  """
  width = vocab_width(out)
  bias = out.bias if out.bias is not None else jnp.zeros((width,), jnp.float32)
  bias = bias.astype(jnp.float32)
  if out.vocab_size is not None and out.vocab_size < width:
    bias = jnp.where(jnp.arange(width) < out.vocab_size, bias, -jnp.inf)
  if out.unembed is None:  # Logits are given: nothing is saved by chunks.
    terms = _terms(_wide(out.hidden) + bias, targets, weights)[0]
    total = jnp.sum(weights * terms)
  else:
    weights = weights.astype(jnp.float32)
    total, terms = _cross_entropy(
      out.softcap, out.hidden, out.unembed, bias, targets, weights
    )
  return total, lax.stop_gradient(terms)


def _terms(logits, targets, weights):
  """Returns the cross-entropy where there is a weight, and the log-sums."""
  lse = jax.nn.logsumexp(logits, axis=-1)
  picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  # A position without a weight may have a forbidden target: guard the input.
  picked = jnp.where(weights != 0, picked, lse)
  return lse - picked, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(softcap, *args):
  return _sharded(*args, softcap=softcap, gradients=False)[:2]


def _forward(softcap, hidden, unembed, *rest):
  total, terms, *gradients = _sharded(
    hidden, unembed, *rest, softcap=softcap, gradients=True
  )
  gradients[1] = gradients[1].astype(unembed.dtype)
  return (total, terms), (*gradients, terms)


def _backward(_, saved, cotangents):
  d_hidden, d_unembed, d_bias, terms = saved
  g = cotangents[0]
  scale = lambda x: (g * x).astype(x.dtype)
  return scale(d_hidden), scale(d_unembed), scale(d_bias), None, g * terms


_cross_entropy.defvjp(_forward, _backward)


def _sharded(hidden, unembed, bias, targets, weights, *, softcap, gradients):
  """Runs `_local` on each device's own rows and positions, sums once."""
  rows, context = axis_size(*BATCH_AXES), axis_size(CONTEXT)
  local = functools.partial(_local, softcap=softcap, gradients=gradients)
  batch, length = targets.shape
  if rows * context == 1 or batch % rows or length % context:
    return local(hidden, unembed, bias, targets, weights)
  mesh = jax.sharding.get_abstract_mesh()
  names = tuple(a for a in (*BATCH_AXES, CONTEXT) if a in mesh.shape)

  def summed(*args):
    total, terms, *grads = local(*args)
    total, *grads[1:] = lax.psum((total, *grads[1:]), names)
    return (total, terms, *grads)

  here = jax.P(tuple(a for a in BATCH_AXES if a in names), CONTEXT)
  everywhere = jax.P()
  return jax.shard_map(
    summed,
    axis_names=set(names),
    in_specs=(here, everywhere, everywhere, here, here),
    out_specs=(everywhere, here)
    + ((here, everywhere, everywhere) if gradients else ()),
    check_vma=False,
  )(hidden, unembed, bias, targets, weights)


def _local(hidden, unembed, bias, targets, weights, *, softcap, gradients):
  """Returns (total, terms[, d_hidden, d_unembed, d_bias]) of local positions."""
  shape, width = hidden.shape, unembed.shape[-1]
  hidden = hidden.reshape(-1, shape[-1])
  targets, weights = targets.reshape(-1), weights.reshape(-1)
  matrix = unembed.astype(hidden.dtype)
  n = hidden.shape[0]
  size = min(_chunk_rows(width), n)

  def chunk(h, target, weight):
    capped = jnp.matmul(h, matrix, preferred_element_type=jnp.float32)
    capped = _capped(capped, softcap)
    logits = capped + bias
    term, lse = _terms(logits, target, weight)
    if not gradients:
      return term, None, None, None
    delta = jnp.exp(logits - lse[:, None])
    delta -= jnp.arange(width) == target[:, None]
    delta *= weight[:, None]
    d_bias = jnp.sum(delta, axis=0)
    if softcap is not None:
      delta *= 1.0 - (capped / softcap) ** 2
    delta = delta.astype(h.dtype)
    d_h = jnp.matmul(delta, matrix.T, preferred_element_type=jnp.float32)
    d_w = jnp.matmul(h.T, delta, preferred_element_type=jnp.float32)
    return term, d_h.astype(h.dtype), d_w, d_bias

  if n == size:
    terms, *grads = chunk(hidden, targets, weights)
  else:
    # Positions with a weight first; the tail of the last chunk points past the
    # end, where reads are filled with zeros and writes are dropped.
    order = jnp.argsort(weights == 0, stable=True)
    order = jnp.pad(order, (0, -n % size), constant_values=n)
    active = -(-jnp.sum(weights != 0) // size)
    take = functools.partial(jnp.take, axis=0, mode="fill", fill_value=0)

    def body(i, carry):
      at = lax.dynamic_slice_in_dim(order, i * size, size)
      term, d_h, d_w, d_bias = chunk(
        take(hidden, at), take(targets, at), take(weights, at)
      )
      terms, *grads = carry
      terms = terms.at[at].set(term, mode="drop")
      if gradients:
        grads = [
          grads[0].at[at].set(d_h, mode="drop"),
          grads[1] + d_w,
          grads[2] + d_bias,
        ]
      return (terms, *grads)

    carry = (jnp.zeros((n,), jnp.float32),)
    if gradients:
      carry += (
        jnp.zeros_like(hidden),
        jnp.zeros(unembed.shape, jnp.float32),
        jnp.zeros((width,), jnp.float32),
      )
    terms, *grads = lax.fori_loop(0, active, body, carry)

  total = jnp.sum(weights * terms)
  result = (total, terms.reshape(shape[:-1]))
  if not gradients:
    return result
  return (*result, grads[0].reshape(shape), grads[1], grads[2])

"""Attention against a dense numpy reference, mask by mask."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.mask import BlockCausal, Causal, Full, TwoStream
from dllm_jax.models.attention import attention, flash, splash
from dllm_jax.parallel import make_mesh
from tests.jaxprs import larger_than

BATCH, LENGTH, HEADS, GROUPS, WIDTH = 2, 12, 4, 2, 8
MASKS = [Full(), Causal(), BlockCausal(3), TwoStream(6, 2), TwoStream(6, 6)]


def dense(q, k, v, allowed):
  """Returns float64 attention, heads repeated and the mask written out."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  repeat = q.shape[2] // k.shape[2]
  k, v = np.repeat(k, repeat, axis=2), np.repeat(v, repeat, axis=2)
  scores = np.einsum("bthk,bshk->bhts", q, k) / np.sqrt(q.shape[-1])
  scores = np.where(allowed[:, None], scores, -np.inf)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  return np.einsum("bhts,bshk->bthk", p, v)


def allowed_by_hand(spec, length):
  """Returns the mask of a spec by loops over its published definition."""
  mask = np.zeros((length, length), bool)
  for i in range(length):
    for j in range(length):
      if isinstance(spec, Full):
        mask[i, j] = True
      elif isinstance(spec, Causal):
        mask[i, j] = j <= i
      elif isinstance(spec, BlockCausal):
        mask[i, j] = j // spec.block <= i // spec.block
      else:
        half, block = spec.length, spec.block
        bi, bj = i % half // block, j % half // block
        if i < half and j < half:
          mask[i, j] = bi == bj
        elif i < half:
          mask[i, j] = bj < bi
        elif j >= half:
          mask[i, j] = bj <= bi
  return mask


def draw(length=LENGTH, heads=HEADS, groups=GROUPS, width=WIDTH):
  rng = np.random.default_rng(0)
  shapes = [(BATCH, length, n, width) for n in (heads, groups, groups)]
  return [2 * rng.normal(size=shape).astype(np.float32) for shape in shapes]


def segments_of(spec):
  """Returns segments whose row 0 holds two documents and padding.

  They are repeated in both streams, where there are two.
  """
  row = [1, 1, 2, 2, 2, 0] if isinstance(spec, TwoStream) else [1, 1, 2] * 2
  return np.array([row * 2, [1] * LENGTH], np.int32)


@functools.cache
def outputs(groups):
  """Returns outputs by mask, of one program."""

  def of(q, k, v, spec):
    s = segments_of(spec)
    return attention(q, k, v, mask=spec, q_segments=s, k_segments=s)

  run = jax.jit(lambda *qkv: [of(*qkv, spec) for spec in MASKS])
  return dict(zip(MASKS, run(*draw(groups=groups)), strict=True))


@pytest.mark.parametrize("spec", MASKS, ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_masks_and_segments_equal_the_dense_reference(spec, groups):
  segments = segments_of(spec)
  same = segments[:, :, None] == segments[:, None, :]
  allowed = allowed_by_hand(spec, LENGTH) & same
  expected = dense(*draw(groups=groups), allowed)
  # float32 softmax of scores up to about 10.
  found = outputs(groups)[spec]
  np.testing.assert_allclose(found, expected, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("spec", [Full(), Causal()], ids=str)
def test_cudnn_is_given_lengths_and_no_mask(monkeypatch, spec):
  """By its arithmetic without a GPU; rows of several segments go elsewhere."""

  def plain(*qkv, implementation, **options):
    assert implementation == "cudnn" and "mask" not in options
    return by_xla(*qkv, **options)

  by_xla = jax.nn.dot_product_attention
  monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
  monkeypatch.setattr(flash, "here", lambda spec, q, *_: jnp.full_like(q, 7))
  run = jax.jit(functools.partial(attention, mask=spec, implementation="cudnn"))
  q, k, v = draw()
  row = np.arange(LENGTH)
  tail = np.stack([row < 9, row < 0]).astype(np.int32)
  out = run(q, k, v, q_segments=tail, k_segments=tail)
  allowed = allowed_by_hand(spec, LENGTH) & (tail[0] > 0)
  expected = dense(q[:1], k[:1], v[:1], allowed[None])
  np.testing.assert_allclose(out[0, :9], expected[0, :9], atol=2e-6, rtol=2e-5)
  assert np.isfinite(out).all()
  for several in (tail * (1 + (row > 5)), tail[:, ::-1], tail * 2):
    out = run(q, k, v, q_segments=several, k_segments=several)
    np.testing.assert_array_equal(out, 7)


def test_long_rows_are_scored_some_queries_at_a_time(monkeypatch):
  module = importlib.import_module("dllm_jax.models.attention.dispatch")
  segments = segments_of(Causal())
  slots = np.arange(LENGTH)[None] + np.array([[0], [3]])
  extra = np.arange(LENGTH) != 1
  options = [
    {},
    {"q_slots": slots, "extra": np.broadcast_to(extra, (LENGTH, LENGTH))},
  ]

  def total(q, k, v):
    s = {"q_segments": segments, "k_segments": segments}
    outs = [attention(q, k, v, mask=Causal(), **s, **o) for o in options]
    return sum(jnp.sum(jnp.sin(out)) for out in outs)

  def run():
    traced = jax.jit(jax.grad(total, (0, 1, 2))).trace(*draw())
    compiled = traced.lower().compile()
    return traced.jaxpr, compiled(*draw())

  scores = BATCH * HEADS * LENGTH * LENGTH
  dense, whole = run()
  assert larger_than(dense, scores)
  monkeypatch.setattr(module, "_SCORES", 100)
  monkeypatch.setattr(module, "_PIECE", 5)
  pieces, found = run()
  for a, b in zip(found, whole, strict=True):
    np.testing.assert_allclose(a, b, atol=3e-6, rtol=2e-5)
  assert not larger_than(pieces, scores)


@pytest.mark.parametrize("block", [1, 3, 6])
@pytest.mark.few(1)
def test_two_parts_equal_the_dense_mask_gradients_included(block):
  segments = np.ones((BATCH, LENGTH), np.int32)
  spec = TwoStream(6, block)

  def total(q, k, v, extra):
    def run(q, k, v):
      # An extra mask sends the same spec through the dense path.
      out = attention(
          q, k, v, mask=spec, q_segments=segments, k_segments=segments,
          extra=extra,
      )  # fmt: skip
      return jnp.sum(jnp.sin(out))

    return jax.value_and_grad(run, (0, 1, 2))(q, k, v)

  @jax.jit
  def both(q, k, v):
    everywhere = np.ones((LENGTH, LENGTH), bool)
    return total(q, k, v, None), total(q, k, v, everywhere)

  two_parts, whole = both(*draw())
  for a, b in zip(
    jax.tree.leaves(two_parts), jax.tree.leaves(whole), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=3e-6, rtol=2e-5)


def test_two_streams_never_form_dense_scores():
  length = 64
  q = jnp.ones((1, 2 * length, 1, 2))
  segments = jnp.ones((1, 2 * length), jnp.int32)
  jaxpr = jax.make_jaxpr(
    jax.grad(
      lambda q: attention(
        q,
        q,
        q,
        mask=TwoStream(length, 4),
        q_segments=segments,
        k_segments=segments,
      ).sum()  # fmt: skip
    )
  )(q)
  largest = max(v.aval.size for eqn in jaxpr.jaxpr.eqns for v in eqn.outvars)
  assert largest <= length * length


def test_queries_at_slots_and_an_extra_mask():
  q, k, v = draw()
  q = q[:, :3]
  slots = np.array([[4, 5, 6], [0, 1, 2]])
  extra = np.arange(LENGTH) != 1
  segments = np.ones((BATCH, LENGTH), np.int32)
  out = jax.jit(functools.partial(attention, mask=Causal()))(
      q, k, v, q_segments=segments[:, :3], k_segments=segments,
      q_slots=slots, extra=np.broadcast_to(extra, (3, LENGTH)),
  )  # fmt: skip
  allowed = np.arange(LENGTH) <= slots[:, :, None]
  expected = dense(q, k, v, allowed & extra)
  np.testing.assert_allclose(out, expected, atol=2e-6, rtol=2e-5)


def test_hidden_and_padded_positions():
  q, k, v = draw()
  segments = np.array([[1] * 8 + [0] * 4, [0] * LENGTH])
  call = jax.jit(
    lambda k, v: attention(
      q, k, v, mask=Causal(), q_segments=segments, k_segments=segments
    )
  )
  out = call(k, v)
  assert np.isfinite(out).all()
  k[:, 8:] += 9.0
  v[:, 8:] += 9.0
  moved = call(k, v)
  np.testing.assert_array_equal(out[0, :8], moved[0, :8])


def long_segments():
  """Returns two documents in row 0, in both streams, and one in row 1."""
  row = np.where(np.arange(256) % 128 < 70, 1, 2)
  return np.stack([row, np.ones_like(row)])


@pytest.mark.parametrize("spec", MASKS[:3] + [TwoStream(128, 32)], ids=str)
@pytest.mark.few(1)
def test_splash_equals_the_reference(spec):
  segments = long_segments()

  @jax.jit
  def both(q, k, v):
    kernel = splash.attention(q, k, v, spec, segments, segments, interpret=True)
    return kernel, attention(
      q, k, v, mask=spec, q_segments=segments, k_segments=segments
    )

  out, expected = both(*draw(length=256, heads=2, groups=1, width=128))
  np.testing.assert_allclose(out, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.all
def test_splash_over_divided_positions_gradients_included():
  spec = TwoStream(128, 32)
  draws = draw(length=256, heads=2, groups=1, width=128)
  segments = long_segments()

  def total(run):
    weigh = np.cos(np.arange(BATCH * 256 * 2 * 128.0)).astype(np.float32)

    def of(q, k, v):
      return jnp.vdot(run(q, k, v, spec, segments, segments), weigh)

    return jax.value_and_grad(of, (0, 1, 2))

  plain = lambda q, k, v, mask, a, b: attention(
    q, k, v, mask=mask, q_segments=a, k_segments=b
  )
  expected = jax.device_get(jax.jit(total(plain))(*draws))
  kernel = functools.partial(splash.attention, interpret=True)
  mesh = make_mesh({"data": 1, "context": 2}, jax.devices()[:2])
  with jax.set_mesh(mesh):
    there = jax.device_get(jax.jit(total(kernel))(*draws))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()),
    there,
    expected,
  )


@pytest.mark.all
def test_splash_skips_empty_tiles():
  """Of two streams in n tiles each, n (n + 2) of 4 n^2 tiles are not empty."""
  tiles = lambda spec, length, shards: (
    splash.make_kernel(spec, (length, length), 1, shards).fwd_mask_info
  )
  n, tile = 4, 512
  for shards in (1, 2):
    info = tiles(TwoStream(n * tile, 32), 2 * n * tile, shards)
    # One noisy tile and i + 1 clean ones for the ith tile of each stream.
    assert np.count_nonzero(info.block_mask) == n * (n + 2)
    # The grid is as wide as its fullest row.
    assert info.block_mask.shape[-1] == n + 1
  causal = tiles(BlockCausal(32), n * tile, 1)
  assert np.count_nonzero(causal.block_mask) == n * (n + 1) // 2


@pytest.mark.parametrize(
  "implementation, message",
  [
    ("triton", "None, xla, cudnn, flash, splash"),
    ("splash", "needs a TPU"),
    ("flash", "needs a GPU"),
  ],
)
def test_implementations_that_cannot_run(implementation, message):
  q, k, v = draw()
  segments = jnp.ones((BATCH, LENGTH), jnp.int32)
  with pytest.raises(ValueError, match=message):
    attention(
        q, k, v, mask=Full(), q_segments=segments, k_segments=segments,
        implementation=implementation,
    )  # fmt: skip


def test_two_streams_of_the_wrong_length():
  q, k, v = draw()
  segments = jnp.ones((BATCH, LENGTH), jnp.int32)
  with pytest.raises(ValueError, match="needs 8 positions, not 12"):
    attention(
      q, k, v, mask=TwoStream(4, 2), q_segments=segments, k_segments=segments
    )

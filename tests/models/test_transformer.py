"""The transformer: parameter tree, arithmetic, caches, masks, bad configs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.mask import BlockCausal, Causal, Full, TwoStream
from dllm_jax.core.types import ModelInputs
from dllm_jax.models import block, layers, LoRA, transformer, TransformerConfig
from tests.quick import long

SMALL = TransformerConfig(
    vocab_size=13, width=16, layers=2, heads=4, kv_heads=2, mlp_dim=24,
    vocab_multiple=8, cond_dim=6,
)  # fmt: skip
FULL = dataclasses.replace(
  SMALL, qk_norm=True, qkv_bias=True, conditioned=True, num_classes=3,
  learned_positions=10,
)  # fmt: skip
TIMES = np.array([[0.3], [0.9]], np.float32)


def inputs(length=8, batch=2, **fields):
  return ModelInputs(**{
    "latent": np.random.default_rng(1).integers(13, size=(batch, length)),
    "positions": np.tile(np.arange(length), (batch, 1)),
    "segment_ids": np.ones((batch, length), np.int32),
    **fields,
  })


@functools.cache
def compiled(config):
  """Returns the network, compiled once for inputs of one shape."""
  return jax.jit(transformer(config).apply)


def build(config, x):
  """Returns the network with random parameters, no zeros or ones among them."""
  net = transformer(config)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    centre = 1.0 if path[-1].key == "scale" else 0.0
    return rng.normal(centre, 0.3, leaf.shape).astype(np.float32)

  shapes = jax.eval_shape(net.init, jax.random.key(0), x)
  params = jax.tree_util.tree_map_with_path(draw, shapes)
  apply = compiled(config)
  return lambda *args: jax.device_get(apply(*args)), params


def paths(params):
  flat = jax.tree_util.tree_leaves_with_path(params)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in flat
  }


@pytest.mark.all
def test_first_embeddings_are_as_wide_as_asked():
  wide, usual = (
    jax.jit(
      transformer(
        dataclasses.replace(SMALL, vocab_size=999, embedding_std=std)
      ).init
    )(jax.random.key(0), inputs())
    for std in (1.0, 0.02)
  )
  found = np.asarray(wide["embed"]["embedding"])
  assert abs(found.std() - 1.0) < 0.02
  np.testing.assert_allclose(found, 50 * usual["embed"]["embedding"], rtol=1e-5)
  np.testing.assert_array_equal(
    wide["unembed"]["kernel"], usual["unembed"]["kernel"]
  )
  with pytest.raises(ValueError, match="embedding_std must be above 0, not 0"):
    dataclasses.replace(SMALL, embedding_std=0.0)


def test_learned_positions_are_added_to_tokens():
  """A token whose embedding holds its position's is another token, and no more."""
  config = dataclasses.replace(SMALL, learned_positions=8)
  x = inputs(batch=1, latent=np.array([[0, 1, 2, 3, 4, 5, 6, 7]]))
  apply, params = build(config, x)
  plain = {k: v for k, v in params.items() if k != "positions"}
  table = plain["embed"]["embedding"].copy()
  table[:8] += params["positions"]["embedding"]
  added = plain | {"embed": {"embedding": table}}
  np.testing.assert_allclose(
    apply(params, x)[0].hidden,
    compiled(SMALL)(added, x)[0].hidden,
    atol=2e-5,
    rtol=1e-5,
  )
  with pytest.raises(ValueError, match="rows of 9 positions.*embeds 8: raise"):
    apply(params, inputs(length=9))
  with pytest.raises(ValueError, match="rows of 10 positions"):
    apply(params, x, config.cache(1, 10))


def test_the_parameter_tree():
  net = transformer(FULL)
  params = jax.eval_shape(net.init, jax.random.key(0), inputs())
  layer = {
    "attention_norm/scale": (16,),
    "attention/q/kernel": (16, 4, 4),
    "attention/k/kernel": (16, 2, 4),
    "attention/v/kernel": (16, 2, 4),
    "attention/q/bias": (4, 4),
    "attention/k/bias": (2, 4),
    "attention/v/bias": (2, 4),
    "attention/q_norm/scale": (4,),
    "attention/k_norm/scale": (4,),
    "attention/o/kernel": (4, 4, 16),
    "mlp_norm/scale": (16,),
    "mlp/gate/kernel": (16, 24),
    "mlp/up/kernel": (16, 24),
    "mlp/down/kernel": (24, 16),
    "modulation/kernel": (6, 96),
    "modulation/bias": (96,),
  }
  assert paths(params) == {
    "embed/embedding": (16, 16),
    "positions/embedding": (10, 16),
    "time/hidden/kernel": (256, 6),
    "time/hidden/bias": (6,),
    "time/out/kernel": (6, 6),
    "time/out/bias": (6,),
    "classes/embedding": (4, 6),
    "final_norm/scale": (16,),
    "final_modulation/kernel": (6, 32),
    "final_modulation/bias": (32,),
    "unembed/kernel": (16, 16),
    **{f"layers/{path}": (2, *shape) for path, shape in layer.items()},
  }
  leaves = jax.tree.leaves(params)
  assert all(leaf.dtype == jnp.float32 for leaf in leaves)

  tied = transformer(dataclasses.replace(SMALL, tied=True))
  vectors = dataclasses.replace(SMALL, latent_dim=3, output_dim=5)
  tied = jax.eval_shape(tied.init, jax.random.key(0), inputs())
  latent = inputs(latent=np.ones((2, 8, 3), np.float32))
  vectors = jax.eval_shape(transformer(vectors).init, jax.random.key(0), latent)
  assert set(tied) == {"embed", "layers", "final_norm"}
  assert set(vectors) == {"input", "layers", "final_norm", "output"}


def by_hand(params, tokens, positions):
  """Returns logits of `SMALL` in float64 numpy, full attention."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  norm = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w

  def rotate(x):
    angles = positions[:, :, None, None] * 10_000.0 ** -(np.arange(0, 4, 2) / 4)
    a, b = x[..., :2], x[..., 2:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

  x = p["embed"]["embedding"][tokens]
  for i in range(2):
    layer = jax.tree.map(lambda w, i=i: w[i], p["layers"])
    h = norm(x, layer["attention_norm"]["scale"])
    q, k, v = (
      np.einsum("btd,dhk->bthk", h, layer["attention"][n]["kernel"])
      for n in "qkv"
    )
    q, k = rotate(q), rotate(np.repeat(k, 1, axis=2))
    k, v = np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)
    s = np.einsum("bthk,bshk->bhts", q, k) / 2
    s = np.exp(s - s.max(-1, keepdims=True))
    y = np.einsum("bhts,bshk->bthk", s / s.sum(-1, keepdims=True), v)
    x = x + np.einsum("bthk,hkd->btd", y, layer["attention"]["o"]["kernel"])
    h = norm(x, layer["mlp_norm"]["scale"])
    mlp = layer["mlp"]
    gate = h @ mlp["gate"]["kernel"]
    gate = gate / (1 + np.exp(-gate))
    x = x + (gate * (h @ mlp["up"]["kernel"])) @ mlp["down"]["kernel"]
  return norm(x, p["final_norm"]["scale"]) @ p["unembed"]["kernel"]


def test_equals_the_formulas_in_float64():
  x = inputs()
  apply, params = build(SMALL, x)
  out, cache = apply(params, x)
  assert cache is None and out.vocab_size == 13
  logits = out.hidden @ out.unembed
  expected = by_hand(params, np.asarray(x.latent), np.asarray(x.positions))
  # float32 over two layers, logits up to about 20.
  np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=1e-4)


@functools.cache
def gradient(config):
  """Returns a value and its gradient at the parameters of `FULL`."""
  x = inputs(conditioning=TIMES)
  apply = transformer(config).apply
  total = lambda p: jnp.sum(jnp.sin(apply(p, x, None)[0].hidden))
  return jax.jit(jax.value_and_grad(total))(build(FULL, x)[1])


@pytest.mark.parametrize("change", [
    {"remat": "full"}, long({"remat": "dots", "unroll": 2}),
    long({"unroll": 2}), long({"remat": "dots_no_batch"}),
], ids=str)  # fmt: skip
@pytest.mark.all
def test_unroll_and_remat_change_no_number(change):
  changed = gradient(dataclasses.replace(FULL, **change))
  for a, b in zip(
    jax.tree.leaves(changed), jax.tree.leaves(gradient(FULL)), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4)


def gradient_program(config, x):
  """Returns the compiled gradient of the hidden states' sum."""
  net = transformer(config)
  params = jax.eval_shape(net.init, jax.random.key(0), x)
  gradient = jax.grad(lambda p: jnp.sum(net.apply(p, x, None)[0].hidden))
  return jax.jit(gradient).lower(params).compile()


@pytest.mark.all
def test_remat_saves_memory():
  x = inputs(length=64, batch=4)
  config = dataclasses.replace(SMALL, layers=4, mlp_dim=128)
  full = dataclasses.replace(config, remat="full")
  peaks = [
    gradient_program(c, x).memory_analysis().temp_size_in_bytes
    for c in (full, config)
  ]
  assert peaks[0] < 0.7 * peaks[1]


@pytest.mark.all
def test_remat_computes_again_also_when_unrolled():
  x = inputs()
  config = dataclasses.replace(SMALL, unroll=2)
  dots = dataclasses.replace(config, remat="dots_no_batch")
  flops = [
    gradient_program(c, x).cost_analysis()["flops"] for c in (dots, config)
  ]
  # Attention scores are formed again: 10 % here, 2 % where they are merged.
  assert flops[0] > 1.05 * flops[1]


@pytest.mark.parametrize("spec", [Causal(), BlockCausal(4)], ids=str)
def test_later_tokens_are_invisible(spec):
  x = inputs(mask=spec)
  apply, params = build(SMALL, x)
  hidden = apply(params, x)[0].hidden
  latent = np.where(np.arange(8) < 4, x.latent, 0)
  other = apply(params, x.replace(latent=latent))[0].hidden
  np.testing.assert_array_equal(hidden[:, :4], other[:, :4])


def test_padding_and_neighbouring_segments_are_invisible():
  segments = np.array([[1, 1, 1, 2, 2, 2, 0, 0]])
  positions = np.array([[0, 1, 2, 0, 1, 2, 0, 0]])
  x = inputs(batch=1, segment_ids=segments, positions=positions)
  apply, params = build(SMALL, x)
  hidden = apply(params, x)[0].hidden
  alone = x.replace(
    latent=x.latent[:, 3:6],
    segment_ids=segments[:, 3:6],
    positions=positions[:, 3:6],
  )
  # Sums run in another order: 1e-5 of float32.
  np.testing.assert_allclose(
    apply(params, alone)[0].hidden, hidden[:, 3:6], atol=2e-5, rtol=1e-5
  )
  changed = x.replace(latent=np.where(np.arange(8) < 6, x.latent, 5))
  np.testing.assert_array_equal(
    apply(params, changed)[0].hidden[:, :6], hidden[:, :6]
  )


@pytest.mark.parametrize("spec", [Full(), BlockCausal(2)], ids=str)
@pytest.mark.few(1)
def test_cached_forward_equals_full_forward_with_ragged_rows(spec):
  """Row 0 has 6 slots, row 1 has 4; a block of 2 follows at each row's end."""
  x = inputs(mask=spec)
  apply, params = build(FULL, x)
  real = np.array([8, 6])
  x = x.replace(segment_ids=(np.arange(8) < real[:, None]).astype(np.int32))
  full, filled = apply(params, x, FULL.cache(2, 10))
  shown = x.segment_ids[:, :, None] > 0
  np.testing.assert_allclose(
    full.hidden * shown,
    apply(params, x)[0].hidden * shown,
    atol=2e-5,
    rtol=1e-5,
  )

  start = np.array([6, 4], np.int32)
  prefix = x.segment_ids * (np.arange(8) < start[:, None])
  cache = FULL.cache(2, 10)
  if isinstance(spec, Full):
    cache = filled  # A bidirectional prefix saw the block: refresh in place.
  else:
    _, cache = apply(params, x.replace(segment_ids=prefix), cache)
  at = start[:, None] + np.arange(2)
  pick = lambda a: np.take_along_axis(a, at, axis=1)
  block = x.replace(
    latent=pick(x.latent),
    positions=pick(x.positions),
    segment_ids=np.ones((2, 2), np.int32),
    slot=start,
  )
  out, cache = apply(params, block, cache)
  expected = np.take_along_axis(full.hidden, at[:, :, None], axis=1)
  np.testing.assert_allclose(out.hidden, expected, atol=2e-5, rtol=1e-5)
  np.testing.assert_array_equal(cache.segment_ids, filled.segment_ids)
  kept = filled.segment_ids[None, :, None, :, None] > 0
  for a, b in ((cache.key, filled.key), (cache.value, filled.value)):
    np.testing.assert_allclose(
      np.where(kept, a, 0), np.where(kept, b, 0), atol=2e-5, rtol=1e-5
    )


def test_two_streams_equal_one_stream_with_a_clean_prefix():
  """Block k of the noisy stream = a forward on [clean blocks before k, noisy]."""
  clean = inputs(batch=1)
  noisy = (clean.latent + 3) % 13
  two = lambda a, b: np.concatenate([a, b], axis=1)
  x = clean.replace(
    latent=two(noisy, clean.latent),
    positions=two(clean.positions, clean.positions),
    segment_ids=two(clean.segment_ids, clean.segment_ids),
    mask=TwoStream(8, 2),
  )
  apply, params = build(SMALL, x)
  out = apply(params, x)[0].hidden
  for start in (0, 2, 6):
    mixed = np.where(np.arange(8) < start, clean.latent, noisy)
    alone = apply(params, clean.replace(latent=mixed, mask=BlockCausal(2)))[
      0
    ].hidden
    np.testing.assert_allclose(
        out[:, start : start + 2], alone[:, start : start + 2],
        atol=2e-5, rtol=1e-5,
    )  # fmt: skip


@pytest.mark.all
def test_conditioning_is_zero_at_first_and_read_afterwards():
  x = inputs(conditioning=TIMES, cond=np.array([0, 2]))
  net = transformer(FULL)
  apply, params = build(FULL, x)
  fresh = jax.jit(net.init)(jax.random.key(0), x)
  plain = apply(fresh, x.replace(conditioning=None, cond=None))[0]
  np.testing.assert_array_equal(apply(fresh, x)[0].hidden, plain.hidden)
  hidden = apply(params, x)[0].hidden
  per_token = np.broadcast_to(x.conditioning, (2, 8))
  np.testing.assert_allclose(
      apply(params, x.replace(conditioning=per_token))[0].hidden, hidden,
      atol=1e-5,
  )  # fmt: skip
  zero, none = np.zeros((2, 1), np.float32), np.array([3, 3])
  absent = apply(params, x.replace(conditioning=None, cond=None))[0].hidden
  explicit = apply(params, x.replace(conditioning=zero, cond=none))[0].hidden
  np.testing.assert_array_equal(absent, explicit)
  for change in ({"conditioning": zero}, {"cond": none}):
    moved = apply(params, x.replace(**change))[0].hidden
    assert np.abs(moved - hidden).max() > 1e-2


def test_vectors_in_and_out():
  config = dataclasses.replace(SMALL, latent_dim=3, output_dim=5)
  x = inputs(latent=np.ones((2, 8, 3), np.float32))
  apply, params = build(config, x)
  out = apply(params, x)[0]
  assert out.hidden.shape == (2, 8, 5) and out.unembed is None
  with pytest.raises(ValueError, match=r"takes vectors \[B, T, 3\]"):
    apply(params, inputs())
  with pytest.raises(ValueError, match="takes tokens"):
    transformer(SMALL).init(jax.random.key(0), x)


def test_dropout_only_with_a_key():
  config = dataclasses.replace(SMALL, dropout=0.5)
  x = inputs()
  apply, params = build(config, x)
  plain = apply(params, x)[0].hidden
  np.testing.assert_array_equal(plain, build(SMALL, x)[0](params, x)[0].hidden)
  drop = lambda seed: (
    apply(params, x.replace(dropout_key=jax.random.key(seed)))[0].hidden
  )
  assert (drop(0) == drop(0)).all() and (drop(0) != drop(1)).any()
  assert (drop(0) != plain).any()


@pytest.mark.all
def test_bfloat16_activations_stay_near():
  x = inputs(conditioning=TIMES, cond=np.array([0, 2]))
  apply, params = build(FULL, x)
  half = compiled(dataclasses.replace(FULL, dtype="bfloat16"))
  out = half(params, x)[0]
  assert out.hidden.dtype == jnp.bfloat16
  exact = apply(params, x)[0].hidden
  error = np.abs(np.asarray(out.hidden, np.float32) - exact).mean()
  assert error < 0.05 * np.abs(exact).mean()


@pytest.mark.parametrize("change, message", [
    ({"layers": 0}, "layers must be at least 1, not 0"),
    ({"heads": 3, "kv_heads": None}, "width 16 is no multiple of heads 3"),
    ({"kv_heads": 3}, "kv_heads 3 must divide heads 4"),
    ({"head_dim": 5}, "must be even"),
    ({"rotary_dim": 6}, "no more than the head has"),
    ({"dropout": 1.0}, r"dropout must be in \[0, 1\), not 1.0"),
    ({"tied": True, "output_dim": 4}, "tied=True needs token inputs"),
    ({"dtype": "float64"}, "dtype 'float64' is unknown; choose one of float32"),
    ({"remat": "half"}, "remat 'half' is unknown; choose one of none, full"),
    ({"attention": "fast"}, "attention implementation 'fast' is unknown"),
], ids=str)  # fmt: skip
def test_bad_configs(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(
      SMALL,
      head_dim=change.get("head_dim"),
      **{
        "rotary_dim": None,
        **{k: v for k, v in change.items() if k != "head_dim"},
      },
    )


@pytest.mark.few(1)
@pytest.mark.parametrize(
  "change",
  [
    {"unroll": 1},
    {"layers": 3, "experts": 4, "experts_per_token": 2, "dense_layers": (0,)},
    {"adapter": LoRA(rank=2, targets="layers/.*/(q|up)")},
  ],
  ids=("alike", "of two kinds", "adapted"),
)
def test_layers_that_lie_apart_are_those_of_the_stack(change):
  """With a cache and without one; adapters are where they were."""
  config = dataclasses.replace(SMALL, conditioned=False, **change)
  net, params = build(config, inputs())
  parted = layers.apart(params)
  assert layers.is_apart(parted) and not layers.is_apart(params)
  assert layers.apart(parted) is parted
  some = inputs(length=4, slot=np.array([2, 4], np.int32))
  for x, cache in ((inputs(), None), (some, config.cache(2, 8))):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
      net(params, x, cache),
      net(parted, x, cache),
    )


@pytest.mark.parametrize("kind, change, parted", [
    ("cpu", {"unroll": 1}, False),
    ("cpu", {"unroll": 2}, True),
    ("tpu", {"unroll": 2}, False),  # reads matrices where they lie in a stack
    ("NVIDIA H200", {"unroll": 1}, True),
    ("NVIDIA H200", {"experts": 4}, True),
])  # fmt: skip
def test_layers_lie_apart_where_products_would_copy(
  monkeypatch, kind, change, parted
):
  monkeypatch.setattr(block, "platform", lambda: kind)
  net = transformer(dataclasses.replace(SMALL, **change))
  params = jax.eval_shape(net.init, jax.random.key(0), inputs())
  assert layers.is_apart(jax.eval_shape(net.hold, params)) == parted

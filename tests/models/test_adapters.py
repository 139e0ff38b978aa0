"""Adapters by their formulas: fresh, multiplied out, and in the gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.types import ModelInputs
from dllm_jax.models import DoRA, LoRA, merge_adapters, without_adapters
from dllm_jax.models.quantised import dense, freeze, is_quantised
from dllm_jax.models.transformer import transformer, TransformerConfig

_IDS = jnp.arange(12, dtype=jnp.int32).reshape(2, 6) % 7
INPUTS = ModelInputs(
  latent=_IDS,
  positions=jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (2, 6)),
  segment_ids=jnp.ones_like(_IDS),
)
SMALL = TransformerConfig(
  vocab_size=7, width=64, layers=2, heads=2, mlp_dim=128, vocab_multiple=8
)


def _network(**adapter):
  kind = adapter.pop("kind", LoRA)
  config = dataclasses.replace(SMALL, adapter=kind(**adapter))
  return config, transformer(config)


def _moved(params):
  """Returns parameters whose adapters have learned something."""

  def move(path, leaf):
    if not path[-1].key.startswith("lora_"):
      return leaf
    # Wider ones make scores of hundreds, which float32 rounds visibly.
    return leaf + 0.1 * jax.random.normal(jax.random.key(len(path)), leaf.shape)

  return jax.tree_util.tree_map_with_path(move, params)


def _hidden(denoiser, params):
  return jax.jit(lambda p: denoiser.apply(p, INPUTS, None)[0].hidden)(params)


@pytest.mark.all
@pytest.mark.parametrize("kind", [DoRA, LoRA])
def test_a_fresh_adapter_is_the_network_and_merging_is_what_was_learned(kind):
  config, denoiser = _network(kind=kind, rank=3, scaling="root")
  params = denoiser.init(jax.random.key(0), INPUTS)
  plain = transformer(SMALL)
  base = without_adapters(params)
  shapes = jax.eval_shape(lambda: plain.init(jax.random.key(0), INPUTS))
  assert jax.tree.map(jnp.shape, base) == jax.tree.map(jnp.shape, shapes)
  first = _hidden(plain, base)
  np.testing.assert_array_equal(_hidden(denoiser, params), first)
  params = _moved(params)
  learned = _hidden(denoiser, params)
  assert np.abs(learned - first).max() > 0.1
  merged = merge_adapters(params, config)
  np.testing.assert_allclose(_hidden(plain, merged), learned, atol=2e-5)


def test_scales():
  assert LoRA(rank=4, alpha=8.0).scale == 2.0
  assert LoRA(rank=4, alpha=8.0, scaling="root").scale == 4.0


def test_the_gradient_of_dora_is_the_published_one():
  """Written out (arXiv:2402.09353, eq. 6 with the norm a constant, sec. 4.3)."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  w, a, b, mu = draw(5, 4), draw(5, 2), draw(2, 4), 0.1 * draw(4)
  x, g = draw(3, 5), draw(3, 4)
  dora = DoRA(rank=2, alpha=3.0)

  def loss(adapter):
    return jnp.sum(dora.apply(x, x @ w, w, adapter) * g)

  names = ("lora_a", "lora_b", "lora_magnitude")
  found = jax.grad(loss)(dict(zip(names, (a, b, mu), strict=True)))
  v = w + 1.5 * a @ b
  norm, m = np.linalg.norm(v, axis=0), np.linalg.norm(w, axis=0) + mu
  outer = x.T @ g  # the gradient of the whole matrix
  d_v = outer * (m / norm)
  expected = (
    1.5 * d_v @ b.T,
    1.5 * a.T @ d_v,
    np.sum(outer * v, axis=0) / norm,
  )
  for name, right in zip(names, expected, strict=True):
    np.testing.assert_allclose(found[name], right, rtol=1e-4, atol=1e-5)


def test_targets_choose_matrices_and_say_what_there_is():
  _, denoiser = _network(rank=2, targets=".*attention/[qv]")
  params = jax.eval_shape(lambda: denoiser.init(jax.random.key(0), INPUTS))
  adapted = {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree_util.tree_leaves_with_path(params)
    if path[-1].key == "lora_a"
  }
  assert adapted == {f"layers/attention/{x}/lora_a" for x in "qv"}
  _, denoiser = _network(rank=2, targets="q_proj")
  with pytest.raises(ValueError, match="'q_proj' matches.*layers/attention/q,"):
    jax.eval_shape(lambda: denoiser.init(jax.random.key(0), INPUTS))


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"rank": -1}, "rank must be at least 0"),
    ({"rank": 2, "targets": "("}, "no regular expression"),
    ({"rank": 2, "scaling": "up"}, "'up'; legal: rank, root"),
    ({"rank": 2, "base": "fp4"}, "'fp4'; legal: default, int8, int4, nf4"),
    ({"base": "nf4"}, "set adapter.rank"),
  ],
)
def test_bad_fields_are_named(fields, message):
  with pytest.raises(ValueError, match=message):
    LoRA(**fields)


@pytest.mark.all
@pytest.mark.parametrize(
  "base, most",
  [("nf4", 0.1), *(
    pytest.param(*case, marks=pytest.mark.all)
    for case in (("int8", 0.01), ("int4", 0.12))
  )],
)  # fmt: skip
def test_matrices_in_few_bits_are_the_network_of_what_they_hold(base, most):
  """Loss and gradients of adapters, against the matrices read back."""
  config, denoiser = _network(rank=2, base=base)
  params = _moved(denoiser.init(jax.random.key(0), INPUTS))
  held = jax.jit(lambda p: freeze(p, base))(params)
  read = jax.tree.map(dense, held, is_leaf=is_quantised)
  count = 0
  for a, b, q in zip(
    jax.tree.leaves(params),
    jax.tree.leaves(read),
    jax.tree.leaves(held, is_leaf=is_quantised),
    strict=True,
  ):
    if is_quantised(q):
      count += 1
      assert 0 < np.abs(a - b).mean() < most * np.abs(a).mean()
    else:
      np.testing.assert_array_equal(a, b)
  assert count == 7

  def loss(adapters, rest):
    params = jax.tree.map(
      lambda mine, other: other if mine is None else mine,
      adapters,
      rest,
      is_leaf=lambda x: x is None or is_quantised(x),
    )
    return jnp.sum(denoiser.apply(params, INPUTS, None)[0].hidden[..., :3] ** 2)

  mine = jax.tree_util.tree_map_with_path(
    lambda path, x: x if path[-1].key.startswith("lora_") else None, params
  )
  both = jax.jit(lambda m, rest: jax.value_and_grad(loss)(m, rest))
  found, right = both(mine, held), both(mine, read)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4)
  merged = merge_adapters(held, config)
  assert not any(
    map(is_quantised, jax.tree.leaves(merged, is_leaf=is_quantised))
  )

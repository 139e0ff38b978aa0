"""The DiT's parameter tree, conditioning and bad configs; its arithmetic is
tested against recorded logits in tests/pretrained."""

import dataclasses

import jax
import numpy as np
import pytest

from dllm_jax.core.types import ModelInputs
from dllm_jax.models import dit, DiTConfig
from dllm_jax.parallel import make_mesh, shardings

CONFIG = DiTConfig(
    vocab_size=13, width=16, layers=2, heads=4, cond_dim=6, vocab_multiple=8,
    num_classes=3,
)  # fmt: skip


def inputs(**fields):
  return ModelInputs(**{
    "latent": np.random.default_rng(1).integers(13, size=(2, 6)),
    "positions": np.tile(np.arange(6), (2, 1)),
    "segment_ids": np.ones((2, 6), np.int32),
    **fields,
  })


def shapes(config):
  tree = jax.eval_shape(dit(config).init, jax.random.key(0), inputs())
  return tree, {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def test_the_parameter_tree():
  layer = {
    "attention_norm/scale": (16,),
    "attention/q/kernel": (16, 4, 4),
    "attention/k/kernel": (16, 4, 4),
    "attention/v/kernel": (16, 4, 4),
    "attention/o/kernel": (4, 4, 16),
    "mlp_norm/scale": (16,),
    "mlp/up/kernel": (16, 64),
    "mlp/up/bias": (64,),
    "mlp/down/kernel": (64, 16),
    "mlp/down/bias": (16,),
    "modulation/kernel": (6, 96),
    "modulation/bias": (96,),
  }
  whole = {
    "embed/embedding": (16, 16),
    "time/hidden/kernel": (256, 6),
    "time/hidden/bias": (6,),
    "time/out/kernel": (6, 6),
    "time/out/bias": (6,),
    "classes/embedding": (4, 6),
    "final_norm/scale": (16,),
    "final_modulation/kernel": (6, 32),
    "final_modulation/bias": (32,),
    "unembed/kernel": (16, 16),
    "unembed/bias": (16,),
    **{f"layers/{path}": (2, *shape) for path, shape in layer.items()},
  }
  assert shapes(CONFIG)[1] == whole
  plain = dataclasses.replace(CONFIG, adaptive=False, num_classes=0, tied=True)
  adaptive = ("time", "classes", "modulation", "final_modulation")
  assert shapes(plain)[1] == {
    path: shape
    for path, shape in whole.items()
    if not set(path.split("/")) & set(adaptive) and path != "unembed/kernel"
  }


def test_the_published_size_and_its_sharding():
  tree, _ = shapes(DiTConfig(vocab_size=50258))
  count = sum(leaf.size for leaf in jax.tree.leaves(tree))
  assert 165e6 < count < 175e6  # 92M in blocks, embedding and head of 39M each.
  shardings(tree, make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))


@pytest.mark.all
def test_a_fresh_network_says_nothing_and_hears_once_trained():
  net = dit(CONFIG)
  params = jax.device_get(jax.jit(net.init)(jax.random.key(0), inputs()))
  sigma = np.array([[0.5], [3.0]], np.float32)

  @jax.jit
  def apply(params, cond):
    """Returns outputs that are told nothing, both, the time and the class."""
    told = ({}, {"conditioning": sigma, "cond": cond})
    told += ({"conditioning": sigma}, {"cond": cond})
    return [net.apply(params, inputs(**fields))[0] for fields in told]

  out, fresh, *_ = jax.device_get(apply(params, np.array([0, 2])))
  assert not out.unembed.any() and not out.bias.any()
  np.testing.assert_array_equal(fresh.hidden, out.hidden)
  params = jax.tree.map(lambda p: p + np.float32(0.1), params)
  out, _, timed, classed = jax.device_get(apply(params, np.array([3, 3])))
  for moved in (timed, classed):
    assert np.abs(moved.hidden - out.hidden).max() > 1e-3


@pytest.mark.parametrize("change, message", [
    ({"width": 20}, "width 20 must be a multiple of twice the heads 4"),
    ({"adaptive": False}, "num_classes needs adaptive=True"),
    ({"dropout": -0.1}, r"dropout must be in \[0, 1\)"),
    ({"layers": 0}, "DiTConfig.layers must be at least 1"),
    ({"remat": "half"}, "remat 'half' is unknown"),
], ids=str)  # fmt: skip
def test_bad_configs(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, mlp_dim=None, **change)


def test_vectors():
  vectors = inputs(latent=np.ones((2, 6, 3), np.float32))
  with pytest.raises(ValueError, match="takes tokens"):
    dit(CONFIG).init(jax.random.key(0), vectors)
  network = dit(dataclasses.replace(CONFIG, latent_dim=3, output_dim=5))
  run = lambda key: network.apply(network.init(key, vectors), vectors, None)
  out, _ = jax.eval_shape(run, jax.random.key(0))
  assert out.hidden.shape == (2, 6, 5) and out.unembed is None
  with pytest.raises(ValueError, match="takes vectors"):
    network.init(jax.random.key(0), inputs())
  with pytest.raises(ValueError, match="tied=True needs token inputs"):
    dataclasses.replace(CONFIG, tied=True, latent_dim=3)

"""Sharding rules, global batches, and a model that no mesh changes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dllm_jax.core.axes import AXES
from dllm_jax.core.types import Batch, ModelInputs
from dllm_jax.core.vocabulary import cross_entropy
from dllm_jax.models import transformer, TransformerConfig
from dllm_jax.parallel import (
  batch_sharding,
  global_batch,
  make_mesh,
  RULES,
  sharding,
  shardings,
)

CONFIG = TransformerConfig(
    vocab_size=29, width=16, layers=2, heads=4, kv_heads=2, mlp_dim=32,
    vocab_multiple=8, conditioned=True, num_classes=2, qkv_bias=True,
    cond_dim=8,
)  # fmt: skip
CUBE = {"data": 2, "fsdp": 2, "tensor": 2}


def inputs(rows=8, length=8):
  tokens = jax.random.randint(jax.random.key(1), (rows, length), 0, 29)
  return ModelInputs(
    latent=tokens,
    positions=jnp.tile(jnp.arange(length), (rows, 1)),
    segment_ids=jnp.ones((rows, length), jnp.int32),
    conditioning=jnp.linspace(0, 1, rows)[:, None],
  )


def specs(tree):
  flat = jax.tree_util.tree_leaves_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec
    for path, leaf in flat
  }


def test_parameters_and_optimizer_state_lie_alike():
  params = jax.eval_shape(transformer(CONFIG).init, jax.random.key(0), inputs())
  state = {
    "params": {"model": params},
    "opt_state": jax.eval_shape(optax.adam(1e-3).init, {"model": params}),
    "step": jax.ShapeDtypeStruct((), jnp.int32),
  }
  placed = specs(shardings(state, make_mesh(CUBE)))
  q = "model/layers/attention/q/kernel"
  assert placed[f"params/{q}"] == jax.P(None, "fsdp", "tensor", None)
  assert placed[f"opt_state/0/mu/{q}"] == placed[f"params/{q}"]
  assert placed[f"opt_state/0/nu/{q}"] == placed[f"params/{q}"]
  assert placed["step"] == placed["params/model/final_norm/scale"] == jax.P()
  own = specs(shardings(params, make_mesh(CUBE)))
  assert placed["params/model/embed/embedding"] == own["embed/embedding"]
  # Every matrix of the network but the two small ones is divided.
  whole = {
    path
    for path, spec in own.items()
    if path.endswith(("kernel", "embedding")) and not any(spec)
  }
  assert whole == {
      "classes/embedding", "time/hidden/kernel", "time/out/kernel"
  }  # fmt: skip


def test_errors_name_the_path():
  mesh = make_mesh({"fsdp": 4, "tensor": 2})
  tree = lambda *shape: {"mlp": {"up": jax.ShapeDtypeStruct(shape, "float32")}}
  rules = [("mlp/up", jax.P("fsdp")), (".*", jax.P())]
  with pytest.raises(ValueError, match="mlp/up: dimension 0 .* axis fsdp .* 4"):
    shardings(tree(6), mesh, rules)
  large = tree(1024, 1025)
  with pytest.raises(ValueError, match=r"mlp/up: 4.0 MiB would be replicated"):
    shardings(large, mesh, rules[1:])
  shardings(tree(1024, 1024), mesh, rules[1:])
  shardings(large, make_mesh({"data": 8}), rules[1:])
  # A rule that divides it along an axis of one device is no oversight.
  shardings(large, make_mesh({"fsdp": 1, "tensor": 8}), rules)
  with pytest.raises(ValueError, match="no sharding rule matches 'mlp/up'"):
    shardings(tree(8), mesh, [("up", jax.P())])


def test_first_match_wins_and_low_ranks_are_replicated():
  mesh = make_mesh(CUBE)
  leaf = jax.ShapeDtypeStruct((2, 4), "float32")
  rules = [("a", jax.P("data")), ("a|b", jax.P(("fsdp", "tensor"), None))]
  placed = specs(shardings({"b": leaf}, mesh, rules[:1] + [(".*", jax.P())]))
  assert placed == {"b": jax.P()}
  placed = specs(shardings({"a": leaf}, mesh, rules))
  assert placed == {"a": jax.P("data")}
  scalar = jax.ShapeDtypeStruct((), "float32")
  assert specs(shardings({"a": scalar}, mesh, rules)) == {"a": jax.P()}


def loss_of(params, x):
  out, _ = transformer(CONFIG).apply(params, x, None)
  weights = jnp.ones(x.latent.shape) / x.latent.size
  return cross_entropy(out, (x.latent + 1) % 29, weights)[0]


def test_lowers_on_an_abstract_mesh():
  x = inputs(rows=64)
  # Explicit axes, the default, would make assertions of placements.
  types = (jax.sharding.AxisType.Auto,) * len(AXES)
  mesh = jax.sharding.AbstractMesh((8, 4, 2, 1, 1), AXES, axis_types=types)
  net = transformer(CONFIG)
  shapes = jax.eval_shape(net.init, jax.random.key(0), x)
  params = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    shapes,
    shardings(shapes, mesh),
  )
  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(jax.grad(loss_of)).trace(params, x)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert '"data"=8' in text and "sharding_constraint" in text


def batch(rows, length=4):
  tokens = np.arange(rows * length, dtype=np.int32).reshape(rows, length)
  return Batch(
    tokens=tokens,
    loss_mask=tokens > 0,
    segment_ids=np.ones_like(tokens),
    positions=tokens,
    loss_weight=np.arange(rows, dtype=np.float32),
  )


def test_global_batch_keeps_values_and_divides_rows():
  mesh = make_mesh({"data": 2, "fsdp": 2, "context": 2})
  placed = global_batch(batch(8), mesh)
  assert placed.tokens.sharding == batch_sharding(mesh)
  assert placed.tokens.addressable_shards[0].data.shape == (2, 2)
  assert placed.loss_weight.addressable_shards[0].data.shape == (2,)
  assert placed.cond is None
  jax.tree.map(np.testing.assert_array_equal, placed, batch(8))


def test_processes_that_hold_the_same_rows_share_them():
  share = sharding._share
  # Rows in 4 blocks over 2 processes; then the second axis across processes.
  apart = np.array([[0, 0], [0, 0], [1, 1], [1, 1]])
  assert share(apart, 1) == (1, 2, (2, 3))
  assert share(np.array([[0, 1], [0, 1]]), 1) == (0, 1, (0, 1))
  both = np.array([[0, 1], [0, 1], [2, 3], [2, 3]])
  assert [share(both, p)[:2] for p in range(4)] == [(0, 2)] * 2 + [(1, 2)] * 2
  # A pod's order of devices may give a process blocks that are not adjacent.
  assert share(np.array([[0], [1], [0], [1]]), 1) == (1, 2, (1, 3))
  with pytest.raises(ValueError, match=r"hold \[0, 1\], \[1, 2\]"):
    share(np.array([[0, 0], [0, 1], [1, 1]]), 0)


def test_global_batch_that_does_not_divide():
  with pytest.raises(ValueError, match="6 rows does not divide over the 8"):
    global_batch(batch(6), make_mesh({"data": 8}))
  with pytest.raises(
    ValueError, match="rows of 5 positions .* context of size"
  ):
    global_batch(batch(8, 5), make_mesh({"data": 4, "context": 2}))


def test_default_rules_end_with_a_catch_all():
  assert RULES[-1] == (".*", jax.P())

"""No mesh changes the loss or its gradients, and each device does its share."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.axes import AXES
from dllm_jax.core.types import ModelInputs
from dllm_jax.core.vocabulary import cross_entropy
from dllm_jax.models import transformer, TransformerConfig
from dllm_jax.parallel import batch_sharding, make_mesh, shardings

ROWS, LENGTH, VOCAB = 8, 16, 29
PLAIN = dict(
    vocab_size=VOCAB, width=16, layers=2, heads=16, kv_heads=8, head_dim=2,
    mlp_dim=32, vocab_multiple=8, conditioned=True, num_classes=2, qkv_bias=True,
    cond_dim=8,
)  # fmt: skip
EXPERTS = dict(
    vocab_size=VOCAB, width=16, layers=2, heads=16, kv_heads=8, head_dim=2,
    vocab_multiple=8, experts=8, expert_dim=16, shared_dim=8, balance_weight=0.1,
)  # fmt: skip
ALONE = [{axis: 8} for axis in AXES]
PAIRS = [{a: 2, b: 4} for a, b in itertools.combinations(AXES, 2)]
MESHES = ALONE + PAIRS
# Compiled fast: what is tested is arithmetic, not speed.
QUICK = {"xla_backend_optimization_level": 0}


def inputs():
  tokens = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, VOCAB)
  # Two documents a row, and padding in the first one.
  segments = jnp.tile(1 + (jnp.arange(LENGTH) > 5), (ROWS, 1))
  return ModelInputs(
    latent=tokens,
    positions=jnp.tile(jnp.arange(LENGTH), (ROWS, 1)),
    segment_ids=segments.at[0, 12:].set(0),
    conditioning=jnp.linspace(0, 1, ROWS)[:, None],
  )


def step(config):
  def loss(params, x):
    out, _ = transformer(config).apply(params, x, None)
    weights = (x.segment_ids > 0) / x.latent.size
    total, _ = cross_entropy(out, (x.latent + 1) % VOCAB, weights)
    return total + out.aux.get("loss", 0.0)

  return jax.value_and_grad(loss)


@functools.cache
def alone(routed):
  """Returns config, parameters, FLOPs, loss and gradients on one device."""
  config = TransformerConfig(**(EXPERTS if routed else PLAIN))
  x = inputs()
  params = jax.jit(transformer(config).init)(jax.random.key(0), x)
  params = jax.tree.map(lambda p: p + 0.01, params)
  run = jax.jit(step(config), compiler_options=QUICK).lower(params, x).compile()
  flops = run.cost_analysis()["flops"]
  return config, params, flops, *jax.device_get(run(params, x))


@pytest.mark.all
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_no_mesh_changes_loss_or_gradients(sizes, capfd):
  config, params, flops, loss, gradient = alone("expert" in sizes)
  mesh = make_mesh(sizes)
  with jax.set_mesh(mesh):
    placed = shardings(params, mesh)
    x = inputs()
    rows = jax.device_put(x.replace(conditioning=None), batch_sharding(mesh))
    x = rows.replace(conditioning=x.conditioning)
    params = jax.device_put(params, placed)
    run = jax.jit(
      step(config), out_shardings=(None, placed), compiler_options=QUICK
    )
    run = run.lower(params, x).compile()
    loss_there, gradient_there = jax.device_get(run(params, x))
  # No activation was replicated on the way from one placement to another.
  assert "Involuntary full rematerialization" not in capfd.readouterr().err
  np.testing.assert_allclose(loss_there, loss, rtol=1e-5)
  # Relative to each array's largest entry: sums run in another order.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()),
    gradient_there,
    gradient,
  )
  if "expert" in sizes:
    return  # counted in tests/models/test_moe.py: here a loop's body counts once
  # An eighth of the matrix products a device; at this size, what every device
  # does alike (time features) adds up to half of that.
  assert 8 * run.cost_analysis()["flops"] < 1.6 * flops

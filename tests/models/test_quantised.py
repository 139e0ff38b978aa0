"""8-bit products: really in 8 bits, and near the products that they replace."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.types import ModelInputs
from dllm_jax.core.vocabulary import cross_entropy
from dllm_jax.models import transformer, TransformerConfig
from tests.jaxprs import equations
from tests.quick import long

CONFIG = TransformerConfig(
    vocab_size=29, width=32, layers=2, heads=2, vocab_multiple=8
)  # fmt: skip


def products(config, params, x):
  """Returns how often each pair of types is multiplied in a train step."""
  found = {}
  for equation in equations(jax.make_jaxpr(step(config))(params, x)):
    if equation.primitive.name == "dot_general":
      types = frozenset(v.aval.dtype.name for v in equation.invars)
      found[types] = found.get(types, 0) + 1
  return found


def step(config):
  def loss(params, x):
    out, _ = transformer(config).apply(params, x, None)
    return cross_entropy(out, x.latent, jnp.ones(x.latent.shape) / 16)[0]

  return jax.value_and_grad(loss)


@pytest.fixture(scope="module")
def plain():
  """Returns inputs, parameters, and what a step makes of them in float32."""
  x = ModelInputs(
    latent=np.random.default_rng(1).integers(29, size=(2, 8)),
    positions=np.tile(np.arange(8), (2, 1)),
    segment_ids=np.ones((2, 8), np.int32),
  )
  params = jax.jit(transformer(CONFIG).init)(jax.random.key(0), x)
  return x, params, jax.jit(step(CONFIG))(params, x)


@pytest.mark.all
@pytest.mark.parametrize("matmul", ["int8", long("fp8")])
def test_products_are_in_8_bits_and_near(plain, matmul):
  pytest.importorskip("qwix")
  x, params, (loss, gradient) = plain
  config = dataclasses.replace(CONFIG, matmul=matmul)
  count = products(config, params, x)
  # q, k, v, o, gate, up and down of the one scanned layer.
  if matmul == "int8":
    assert count[frozenset({"int8"})] == 7
  else:
    assert count[frozenset({"float8_e4m3fn"})] == 7
    assert count[frozenset({"float8_e4m3fn", "float8_e5m2"})] == 14
  assert all(types == {"float32"} for types in products(CONFIG, params, x))

  near, near_gradient = jax.jit(step(config))(params, x)
  # int8 has 7 bits below the largest entry of a row; e4m3 has three after the
  # point, e5m2 two: errors of up to 6 and 12 % a factor, through two layers.
  off_loss, off_gradient = {"int8": (2e-3, 0.1), "fp8": (1e-2, 0.3)}[matmul]
  np.testing.assert_allclose(near, loss, rtol=off_loss)
  assert near != loss
  flat = lambda tree: np.concatenate([g.ravel() for g in jax.tree.leaves(tree)])
  a, b = flat(near_gradient), flat(gradient)
  assert a.dtype == b.dtype
  assert np.linalg.norm(a - b) < off_gradient * np.linalg.norm(b)


def test_refusals(monkeypatch):
  with pytest.raises(ValueError, match="default, int8, fp8"):
    dataclasses.replace(CONFIG, matmul="int4")
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"needs qwix; pip install 'dllm_jax\["):
    dataclasses.replace(CONFIG, matmul="int8")

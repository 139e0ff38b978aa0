"""The forms of products and of rotation in which CPUs are quick.

Equal numbers come of other forms too, so that only a clock would miss these.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.mask import Full
from dllm_jax.core.types import ModelInputs
from dllm_jax.core.vocabulary import best, reduce
from dllm_jax.models import (
  dit,
  DiTConfig,
  DoRA,
  layers,
  LoRA,
  rotary,
  transformer,
  TransformerConfig,
)
from dllm_jax.models.attention.dispatch import attention
from dllm_jax.models.layers import Linear
from dllm_jax.models.quantised import freeze
from dllm_jax.parallel import compilation, make_mesh
from dllm_jax.planning.hlo_text import ARRAY, computations
from dllm_jax.training.frozen import join, split
from tests import jaxprs

X = jax.ShapeDtypeStruct((2, 5, 3, 8), jnp.float32)


def products(linear, x):
  """Returns the ranks of both factors of each product in a gradient."""

  def total(params, x):
    return linear.apply(params, x).sum()

  params = jax.eval_shape(linear.init, jax.random.key(0), x)
  traced = jax.make_jaxpr(jax.grad(total, (0, 1)))(params, x)
  return [
    tuple(len(factor.aval.shape) for factor in equation.invars)
    for equation in jaxprs.equations(traced)
    if equation.primitive.name == "dot_general"
  ]


def test_positions_are_one_axis_of_a_cpus_products():
  """XLA's CPU compiler copies factors of a gradient whose sum has two axes."""
  linears = (
    Linear((8,), (4,)),
    Linear((3, 8), (4,)),
    Linear((8,), (3, 4), bias=True),
  )
  for linear in linears:
    x = jax.ShapeDtypeStruct((2, 5, *linear.inputs), jnp.float32)
    # The product itself, and the gradients of both of its factors.
    assert products(linear, x) == [(2, 2)] * 3
  with jax.set_mesh(make_mesh({"data": 2}, jax.devices()[:2])):
    # One axis would mix rows with positions, which a mesh divides apart.
    x = jax.ShapeDtypeStruct((2, 5, 8), jnp.float32)
    assert (2, 2) not in products(linears[0], x)


def test_a_cpu_turns_heads_without_joining_halves():
  """A loop that reads one of two joined halves branches at every feature."""
  table = jax.ShapeDtypeStruct((2, 5, 1, 4), jnp.float32)

  def joined(turn):
    traced = jax.make_jaxpr(turn)(X, table, table)
    return [n for n, shape in jaxprs.values(traced) if shape == X.shape]

  found = joined(lambda x, *tables: rotary.rotate(x, tables))
  assert found and "concatenate" not in found
  assert "concatenate" in joined(rotary._by_halves)


def _adapted(base="default", kind=LoRA):
  """Returns an adapted layer, its parameters as held, and inputs."""
  linear = Linear((64,), (2, 48), adapter=kind(rank=3, base=base))
  x = jax.random.normal(jax.random.key(0), (2, 40, 64))
  params = linear.init(jax.random.key(1), x)["params"]
  params["lora_b"] = jax.random.normal(jax.random.key(2), (3, 96))
  if kind is DoRA:
    params["lora_magnitude"] = jnp.linspace(-0.5, 0.5, 96)
  stack = {"layers": {"attention": {"q": {"kernel": params["kernel"][None]}}}}
  held = freeze(stack, base)["layers"]["attention"]["q"]["kernel"]
  params["kernel"] = jax.tree.map(lambda leaf: leaf[0], held)
  return linear, params, x


def _value_and_gradients(linear, params, x):
  frozen = params["kernel"]
  mine = {name: value for name, value in params.items() if name != "kernel"}

  def total(mine, x):
    y = linear.apply({"params": mine | {"kernel": frozen}}, x)
    return jnp.sum(jnp.sin(y)), y

  return jax.jit(jax.grad(total, (0, 1), has_aux=True))(mine, x)


@pytest.mark.parametrize(
  "kind, base", [(LoRA, "default"), (DoRA, "default"), (LoRA, "nf4")]
)
@pytest.mark.few(1)
def test_a_sum_of_matrices_is_what_thin_products_are(kind, base, monkeypatch):
  linear, params, x = _adapted(base, kind)
  found = _value_and_gradients(linear, params, x)
  monkeypatch.setattr(layers, "one_is_cheaper", lambda x, fan_out: False)
  right = _value_and_gradients(linear, params, x)
  for a, b in zip(*map(jax.tree.leaves, (found, right)), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * jnp.abs(b).max())


@pytest.mark.all
def test_a_kernel_that_trains_beside_its_adapter_has_its_gradient():
  linear, params, x = _adapted()
  total = lambda params, x: jnp.sum(linear.apply({"params": params}, x) ** 2)
  found = jax.grad(total)(params, x)["kernel"].reshape(64, 96)
  y = linear.apply({"params": params}, x).reshape(-1, 96)
  right = x.reshape(-1, 64).T @ (2 * y)
  np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-2)


def test_a_step_of_an_adapter_adds_nothing_as_large_as_its_outputs():
  """Two large products, a few columns wider, and thin ones of sums and matrices."""
  linear, params, x = _adapted()
  frozen = params.pop("kernel")

  def total(mine, x):
    y = linear.apply({"params": mine | {"kernel": frozen}}, x)
    return jnp.sum(y**2)

  step = compilation.jit(jax.grad(total, (0, 1))).lower(params, x).compile()
  shapes = re.findall(r"f32\[([\d,]+)\]\S* dot\(", step.as_text())
  products = [tuple(map(int, shape.split(","))) for shape in shapes]
  positions = [shape for shape in products if 80 in shape]
  # With x A beside x W, and the gradient of A B's middle beside that of x.
  assert sorted(positions) == [(80, 64 + 3), (80, 96 + 3)]
  others = [sorted(shape) for shape in products if 80 not in shape]
  assert sorted(others) == [[3, 64], [3, 96], [64, 96 + 3], [64 + 3, 96]]


def _trunk(unroll, remat="none", dropout=0.0):
  """Returns a function of the adapters of a network of two layers, and these."""
  network = TransformerConfig(
    vocab_size=11, width=64, layers=2, heads=2, head_dim=20, mlp_dim=48,
    unroll=unroll, remat=remat, dropout=dropout, adapter=LoRA(rank=3),
  )  # fmt: skip
  denoise = transformer(network)
  positions = jnp.broadcast_to(jnp.arange(80), (2, 80))
  seen = ModelInputs(
    positions % 11,
    positions,
    jnp.ones_like(positions),
    dropout_key=jax.random.key(2) if dropout else None,
  )
  params = denoise.init(jax.random.key(0), seen)
  key = jax.random.key(1)
  params = jax.tree.map(lambda x: jax.random.normal(key, x.shape) / 8, params)
  own = lambda path, x: "lora" in jax.tree_util.keystr(path)
  trains = jax.tree_util.tree_map_with_path(own, params)
  adapters, frozen = split(params, trains)

  def total(adapters):
    out = denoise.apply(join(adapters, frozen), seen, None)[0]
    return jnp.sum(jnp.sin(out.hidden))

  return total, adapters


def test_no_gradient_of_frozen_embeddings_is_formed():
  total, adapters = _trunk(unroll=2)
  step = compilation.jit(jax.grad(total)).lower(adapters).compile()
  shapes = re.findall(r"f32\[([\d,]+)\]\S* dot\(", step.as_text())
  # Of each layer o and down forward, gate and up backward; of the second q, k, v.
  assert shapes.count(f"160,{64 + 3}") == 2 * 4 + 3


def test_what_is_dropped_beside_adapters_does_not_depend_on_unroll():
  found, right = (
    jax.jit(total)(adapters)
    for total, adapters in (_trunk(unroll, dropout=0.3) for unroll in (2, 1))
  )
  np.testing.assert_allclose(found, right, rtol=1e-5)


def test_layers_without_a_loop_are_rematerialised():
  found = [
    sum("remat" in e.primitive.name for e in jaxprs.equations(traced))
    for total, adapters in (_trunk(2), _trunk(2, "full"))
    for traced in [jax.make_jaxpr(total)(adapters)]
  ]
  assert found[1] == found[0] + 2


@pytest.mark.parametrize("remat", ["none", "full"])
def test_adapters_of_layers_without_a_loop_have_a_loops_gradients(remat):
  found, right = (
    compilation.jit(jax.grad(total))(adapters)
    for total, adapters in (_trunk(2, remat), _trunk(1))
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0, atol=1e-5 * jnp.abs(b).max()
    ),
    found,
    right,
  )


def test_few_positions_and_other_types_meet_thin_products():
  """A sum of matrices costs more than few positions, and is rounded in 16 bits."""
  one = lambda *shape, dtype=jnp.float32: jax.eval_shape(
    lambda: jnp.zeros(shape, dtype)
  )
  assert layers.one_is_cheaper(one(2, 40, 64), 96)
  assert not layers.one_is_cheaper(one(1, 8, 64), 96)
  assert not layers.one_is_cheaper(one(2, 40, 64, dtype=jnp.bfloat16), 96)
  with jax.set_mesh(make_mesh({"data": 2}, jax.devices()[:2])):
    assert not layers.one_is_cheaper(one(2, 40, 64), 96)


def test_masks_and_cosines_are_computed_once():
  mesh = make_mesh({"data": 1}, jax.devices()[:1])
  positions = jnp.broadcast_to(jnp.arange(64), (2, 64))

  def run(x, segments):
    tables = rotary.rotary_tables(positions + segments, dim=16, theta=1e4)
    q, k = rotary.rotate(x, tables), rotary.rotate(x * 2.0, tables)
    return attention(
      q, k, x, mask=Full(), q_segments=segments, k_segments=segments
    )

  with jax.set_mesh(mesh):
    x, segments = jnp.ones((2, 64, 4, 16)), jnp.ones((2, 64), jnp.int32)
    program = compilation.jit(run, mesh=mesh).lower(x, segments).compile()
  text = program.as_text()
  loops = text.split("\n}\n")
  turned = [one for one in loops if " cosine(" in one]
  masked = [one for one in loops if re.search(r" compare\(.*direction=EQ", one)]
  assert turned and masked
  heads = re.compile(r"f32\[2,(?:64,)?4,")
  assert not any(heads.search(one) for one in turned + masked)


def test_half_the_bits_are_multiplied_as_such_and_summed_in_float32():
  """XLA's CPU compiler widens the factors of products of any other form."""
  linear = Linear((32,), (48,), dtype="bfloat16")
  half = lambda seed, *shape: jax.random.normal(
    jax.random.key(seed), shape, "bfloat16"
  )
  x, w, g = half(0, 2, 8, 32), half(1, 32, 48), half(2, 2, 8, 48)

  def run(w, x, g):
    y, pull = jax.vjp(
      lambda w, x: linear.apply({"params": {"kernel": w}}, x), w, x
    )
    return y, *pull(g)

  dots = [
    equation
    for equation in jaxprs.equations(jax.make_jaxpr(run)(w, x, g))
    if equation.primitive.name == "dot_general"
  ]
  assert len(dots) == 3
  for dot in dots:
    assert all(v.aval.dtype == jnp.bfloat16 for v in dot.invars)
    assert dot.outvars[0].aval.dtype == jnp.float32
  program = compilation.jit(run, dtype="bfloat16")
  found = program(w, x, g)
  wide = lambda x: np.asarray(x, np.float64)
  x, w, g = map(wide, (x, w, g))
  sums = x @ w, np.einsum("btd,btf->df", x, g), g @ w.T
  for one, expected in zip(found, sums, strict=True):
    assert one.dtype == jnp.bfloat16
    # Rounded once: to 8 bits, of sums that float32 may have cancelled.
    np.testing.assert_allclose(wide(one), expected, rtol=2**-8, atol=1e-5)


def _best(make, kind, positions, dtype, **fields):
  """Returns a network's choice of tokens, compiled."""
  network = make(
    kind(
      vocab_size=496, vocab_multiple=1, width=48, layers=2, heads=2, unroll=2,
      dtype=dtype, param_dtype=dtype, **fields,
    )
  )  # fmt: skip
  ids = jnp.ones((1, positions), jnp.int32)
  inputs = ModelInputs(latent=ids, positions=ids, segment_ids=ids)
  params = jax.eval_shape(network.init, jax.random.key(0), inputs)
  run = lambda params: reduce(best, network.apply(params, inputs)[0])
  return compilation.jit(run, dtype=dtype).lower(params).compile().as_text()


@pytest.mark.parametrize("tied", [False, True])
def test_no_matrix_of_half_the_bits_is_widened_for_one_position(tied):
  text = _best(transformer, TransformerConfig, 1, "bfloat16", tied=tied)
  program, _ = computations(text)
  for name, made in program.items():
    if "fused" in name:  # no array of its own
      continue
    for op in made.values():
      found = ARRAY.match(op.shape)
      if found and found[1] == "f32":  # matrices have 2,304 numbers, or more
        assert math.prod(int(n) for n in found[2].split(",") if n) < 2000, op


@pytest.mark.parametrize(
  ("make", "kind"), [(transformer, TransformerConfig), (dit, DiTConfig)]
)
def test_a_network_says_that_its_table_is_tied(make, kind):
  """As the first factor: logits are made turned."""
  text = _best(make, kind, 8, "float32", tied=True)
  dots = [line for line in text.splitlines() if " dot(" in line]
  assert sum("f32[496,8]" in line.split(" dot(")[0] for line in dots) == 1
  assert not any("f32[8,496]" in line.split(" dot(")[0] for line in dots)

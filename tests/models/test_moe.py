"""Routers and experts against sums written out, and over meshes."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose, assert_array_equal
import pytest

from dllm_jax.core.flops import matmul_flops
from dllm_jax.core.types import ModelInputs
from dllm_jax.models import grouped, moe, transformer, TransformerConfig
from dllm_jax.models.moe import choose, Experts
from dllm_jax.parallel import make_mesh, RULES
from dllm_jax.parallel.sharding import shardings
from tests.jaxprs import equations
from tests.quick import long

CONFIG = TransformerConfig(
    vocab_size=11, width=16, layers=3, heads=2, mlp_dim=24, experts=8,
    experts_per_token=2, expert_dim=8, shared_dim=8, dense_layers=(0,),
    router="sigmoid", router_bias=True, router_groups=4, router_top_groups=2,
    router_normalised=True, router_scale=2.5, vocab_multiple=4,
    experts_implementation="ragged",
)  # fmt: skip
FIELDS = {
    "softmax": {"router": "softmax", "router_bias": False, "router_groups": 1,
                "router_top_groups": 1, "router_normalised": False},
    "sigmoid": {},
}  # fmt: skip


def config(router, **changes):
  return dataclasses.replace(CONFIG, **FIELDS[router], **changes)


def params_of(c, key=0):
  x = np.zeros((1, 1, c.width), np.float32)
  shapes = jax.eval_shape(
    Experts(c).init, jax.random.key(0), x, np.ones((1, 1), bool)
  )
  rng = np.random.default_rng(key)
  draw = lambda leaf: rng.normal(scale=0.3, size=leaf.shape)
  return jax.tree.map(lambda x: draw(x).astype(np.float32), shapes["params"])


def by_hand(params, c, x):
  """Returns one position's mixture by a loop over experts, in float64."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  logits = x @ p["router"]["kernel"]
  scores = 1 / (1 + np.exp(-logits))
  if c.router == "softmax":
    scores = np.exp(logits) / np.exp(logits).sum()
  ranked = scores + (p["router"]["expert_bias"] if c.router_bias else 0)
  groups = ranked.reshape(c.router_groups, -1)
  best = np.sort(groups, axis=1)[:, -2:].sum(1)
  allowed = np.argsort(best)[-c.router_top_groups :]
  size = c.experts // c.router_groups
  legal = [e for e in range(c.experts) if e // size in allowed]
  chosen = sorted(legal, key=lambda e: -ranked[e])[: c.experts_per_token]
  silu = lambda a: a / (1 + np.exp(-a))
  swiglu = lambda g, u, d: (silu(x @ g) * (x @ u)) @ d
  total = sum(scores[e] for e in chosen) if c.router_normalised else 1.0
  y = sum(
    scores[e]
    / total
    * swiglu(*(p["experts"][n][e] for n in ("gate", "up", "down")))
    for e in chosen
  )
  shared = swiglu(*(p["shared"][n]["kernel"] for n in ("gate", "up", "down")))
  return c.router_scale * y + shared, chosen


@pytest.mark.parametrize("implementation", moe.IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("router", FIELDS)
@pytest.mark.few(3)
def test_mixture(router, implementation):
  c = config(router, experts_implementation=implementation)
  params = params_of(c)
  x = np.random.default_rng(0).normal(size=(2, 5, c.width)).astype(np.float32)
  real = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
  y, report = jax.jit(Experts(c).apply)({"params": params}, x, real)
  hits = np.zeros(c.experts)
  for i, j in np.ndindex(2, 5):
    expected, chosen = by_hand(params, c, x[i, j].astype(np.float64))
    assert_allclose(y[i, j], expected, atol=1e-5)
    hits[chosen] += real[i, j]
  assert_allclose(report["expert_share"], hits / hits.sum(), atol=1e-6)


def unkind(*given, sizes):
  """Returns a grouped product, with NaN where no group has a row."""
  there = lambda x: (jnp.arange(x.shape[0]) < jnp.sum(sizes))[:, None]

  @jax.custom_vjp
  def product(rows, kernel):
    out = jax.lax.ragged_dot(jnp.where(there(rows), rows, 0), kernel, sizes)
    return jnp.where(there(rows), out, jnp.nan)

  def backward(saved, d):
    rows, kernel = saved
    rows, d = (jnp.where(there(x), x, 0) for x in (rows, d))
    of = lambda *a: jax.lax.ragged_dot(*a, sizes)
    d_rows, d_kernel = jax.vjp(of, rows, kernel)[1](d)
    return jnp.where(there(rows), d_rows, jnp.nan), d_kernel

  product.defvjp(lambda *a: (product(*a), a), backward)
  return product(*given)


def test_tiles_and_sorted_rows_of_any_routing(monkeypatch):
  """As every expert on every row: one has most rows, one none, four are away."""
  monkeypatch.setattr(grouped, "product", unkind)
  rng = np.random.default_rng(0)
  rows, count, experts, first = 90, 2, 4, 2
  x = rng.normal(size=(2, rows // 2, 6)).astype(np.float32)
  chosen = rng.choice([0, 1, 3, 4, 5, 7], size=(2, rows // 2, count))
  chosen[:, :30, 0] = 4
  chosen = jnp.asarray(chosen)
  weights = rng.uniform(size=chosen.shape).astype(np.float32)
  shapes = ((experts, 6, 5), (experts, 6, 5), (experts, 5, 6))
  kernels = tuple(
    rng.normal(size=s, scale=0.4).astype(np.float32) for s in shapes
  )

  def gradient(mix, x, weights, kernels):
    def loss(x, weights, kernels):
      y = mix(x, chosen, weights, kernels, first)
      return jnp.sum(jnp.sin(y)), y

    return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(
      x, weights, kernels
    )

  mixes = (grouped.mixture, moe._ragged, moe._batched, moe._dense)
  *found, expected = jax.jit(
    lambda *args: [gradient(mix, *args) for mix in mixes]
  )(x, weights, kernels)
  for one in found:
    jax.tree.map(lambda a, b: assert_allclose(a, b, atol=2e-5), one, expected)


@pytest.mark.parametrize("kind, version, library, positions, expected", [
    ("tpu", (0, 10, 2), True, 600, "tiled"),  # the gradient of matrices is dense
    ("tpu", (0, 10, 2), True, 256, "batched"),
    ("tpu", (0, 12, 0), False, 256, "ragged"),
    ("NVIDIA H200", (0, 12, 0), False, 600, "tiled"),
    ("NVIDIA H200", (0, 12, 0), False, 1, "tiled"),  # which reads few experts
    ("NVIDIA H200", (0, 12, 0), False, 256, "batched"),
    ("NVIDIA H200", (0, 10, 2), True, 600, "ragged"),
    ("NVIDIA H200", (0, 10, 2), True, 256, "ragged"),
    ("cpu", (0, 12, 0), True, 256, "dense"),
])  # fmt: skip
def test_the_usual_form_is_one_that_multiplies_in_groups(
  monkeypatch, kind, version, library, positions, expected
):
  monkeypatch.setattr(moe, "platform", lambda: kind)
  monkeypatch.setattr(jax, "__version_info__", version)
  monkeypatch.setattr(grouped, "library", lambda: library or None)
  given = config("sigmoid", experts_implementation=None)
  assert moe._implementation(given, positions) == expected


def asking(monkeypatch, lacks=None):
  """Returns the list of kernels that a GPU's library will be asked for first."""
  asked = []

  def ragged_dot(*given, implementation):
    asked.append(implementation[0])
    if lacks == implementation[0]:
      raise ValueError(f"Unknown implementation: {lacks}")
    return jax.lax.ragged_dot(*given)

  library = types.SimpleNamespace(ragged_dot=ragged_dot)
  monkeypatch.setattr(grouped, "platform", lambda: "NVIDIA H200")
  monkeypatch.setattr(grouped, "library", lambda: library)
  return asked


@pytest.mark.parametrize("rows, width, lacks, first", [
    (2047, 64, None, "triton"),
    (2048, 64, None, "mosaic"),
    (2048, 88, None, "triton"),  # no tiles of 64
    (2047, 64, "triton", "mosaic"),  # as tokamax 0.0.17 without triton
    (2047, 88, "triton", "xla"),
])  # fmt: skip
def test_the_kernel_whose_program_grows_is_for_many_rows(
  monkeypatch, rows, width, lacks, first
):
  asked = asking(monkeypatch, lacks)
  sizes = jnp.array([rows - 5, 5])
  x, kernel = jnp.ones((rows, 64)), jnp.ones((2, 64, width))
  assert_array_equal(grouped.product(x, kernel, sizes=sizes), 64)
  assert asked == ([lacks] if lacks else []) + [first]


def test_experts_of_other_devices_have_some_of_the_rows(monkeypatch):
  asked = asking(monkeypatch)
  sizes = jnp.array([1024, 1024])
  of = jax.ShapeDtypeStruct
  for experts, first in ((1, "mosaic"), (2, "triton")):
    with jax.set_mesh(make_mesh({"expert": experts, "data": 8 // experts})):
      jax.eval_shape(
        functools.partial(grouped.product, sizes=sizes),
        of((2048, 64), "float32"),
        of((2, 64, 64), "float32"),
      )
    assert asked.pop() == first


def test_rows_of_experts_are_gathered_forwards_and_back():
  c = config("sigmoid")
  params, x = params_of(c), np.ones((2, 6, c.width), np.float32)
  real = np.ones((2, 6), bool)
  loss = lambda p, x: jnp.sum(Experts(c).apply({"params": p}, x, real)[0])
  found = {
    (e.primitive.name, e.outvars[0].aval.shape)
    for e in equations(jax.make_jaxpr(jax.grad(loss, (0, 1)))(params, x))
    if e.primitive.name in ("gather", "scatter-add", "ragged_dot_general")
  }
  assert ("gather", (24, c.width)) in found
  # Scores of routers are small; no row of the width is scattered.
  wide = [s for name, s in found if name == "scatter-add" and c.width in s]
  assert not wide


def test_the_bias_chooses_and_weighs_nothing():
  scores = np.array([[0.1, 0.9, 0.8, 0.2]])
  assert_array_equal(choose(scores, count=1), [[1]])
  assert_array_equal(choose(scores + np.array([5.0, 0, 0, 0]), count=1), [[0]])
  # Groups {0, 1} and {2, 3}: the better sum wins, though 1 is the best alone.
  grouped = np.array([[0.1, 0.9, 0.8, 0.7]])
  picked = choose(grouped, count=2, groups=2, top_groups=1)
  assert_array_equal(picked, [[2, 3]])


def test_balance_is_k_where_all_are_used_alike():
  c = config("softmax")
  params = params_of(c)
  params["router"]["kernel"] = np.zeros_like(params["router"]["kernel"])
  x = np.ones((1, 4, c.width), np.float32)
  run = jax.jit(lambda p, x: Experts(c).apply(p, x, np.ones((1, 4), bool))[1])
  report = run({"params": params}, x)
  # All scores are 1/E, whichever are chosen.
  assert_allclose(report["balance"], c.experts_per_token, rtol=1e-6)


@pytest.mark.all
@pytest.mark.parametrize("rows, sizes", [
    long(8, {"fsdp": 2, "tensor": 2, "expert": 2}),
    (8, {"data": 2, "expert": 4}),
    long(1, {"fsdp": 2, "tensor": 2, "expert": 2}),  # one row is left whole
], ids=str)  # fmt: skip
def test_ragged_meshes_agree(rows, sizes):
  c = dataclasses.replace(CONFIG, layers=1, dense_layers=(), balance_weight=0.1)
  network = transformer(c)
  tokens = np.random.default_rng(0).integers(11, size=(rows, 6))
  segments = np.ones((rows, 6), np.int32)
  segments[0, 4:] = 0
  inputs = ModelInputs(
    latent=tokens,
    positions=np.broadcast_to(np.arange(6), tokens.shape),
    segment_ids=segments,
  )
  params = jax.jit(network.init)(jax.random.key(1), inputs)

  @jax.jit
  def gradient(params):
    def loss(params):
      out = network.apply(params, inputs, None)[0]
      mixed = jnp.sin(out.hidden) * (inputs.segment_ids > 0)[..., None]
      return jnp.mean(mixed) + out.aux["loss"]

    return jax.value_and_grad(loss)(params)

  alone = jax.device_get(gradient(params))
  params = jax.device_get(params)
  mesh = make_mesh({"data": 1} | sizes)
  with jax.set_mesh(mesh):
    params = jax.device_put(params, shardings(params, mesh, RULES))
    together = jax.device_get(gradient(params))
  # Gradients up to 1, summed in another order.
  jax.tree.map(lambda a, b: assert_allclose(a, b, atol=1e-5), alone, together)
  bias = alone[1]["layers"]["mlp"]["router"]["expert_bias"]
  assert not bias.any()  # the choice has no gradient


@pytest.mark.all
def test_each_device_multiplies_by_its_own_experts_only():
  """Of 8 experts over 8 devices, each has one, and all positions meet it."""
  c = dataclasses.replace(CONFIG, shared_dim=0, experts_implementation="dense")
  x = np.ones((8, 4, c.width), np.float32)
  params = params_of(c)

  def run(params, x):
    return Experts(c).apply({"params": params}, x, np.ones((8, 4), bool))[0]

  alone = matmul_flops(run, params, x)
  router = 2 * x.size * c.experts
  assert alone == router + 6 * x.size * c.expert_dim * c.experts
  for sizes in (
    {"expert": 8},
    {"fsdp": 2, "expert": 4},
    {"data": 4, "expert": 2},
  ):
    mesh = make_mesh({"data": 1} | sizes)
    with jax.set_mesh(mesh):
      assert matmul_flops(run, params, x) == alone
      place = jax.tree.map(
        lambda leaf, rule: jax.device_put(leaf, jax.NamedSharding(mesh, rule)),
        params["experts"],
        {"gate": jax.P("expert", "fsdp"), "up": jax.P("expert", "fsdp"),
         "down": jax.P("expert", None, "fsdp")},
      )  # fmt: skip
      compiled = jax.jit(run).lower(params | {"experts": place}, x).compile()
    # No device ever holds another's experts: only positions and, over fsdp, the
    # halves of its own are gathered.
    gathered = re.findall(
      r"= f32\[([\d,]+)\][^\n]* all-gather\(", compiled.as_text()
    )
    own = c.experts // sizes["expert"] * c.width * c.expert_dim
    assert gathered
    assert all(
      np.prod([int(n) for n in shape.split(",")]) <= max(own, x.size)
      for shape in gathered
    )


@pytest.mark.parametrize("change, message", [
    ({"router_groups": 3}, "must divide experts 8"),
    ({"router_top_groups": 5}, "at least router_top_groups 5"),
    ({"experts_per_token": 5}, "more than the 4 experts"),
    ({"router": "tanh"}, "softmax, sigmoid"),
    ({"experts_implementation": "x"}, "ragged, tiled, batched, dense"),
])  # fmt: skip
def test_refusals(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **change)

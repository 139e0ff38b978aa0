"""Learning rates by their closed form; what decays and what is clipped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dllm_jax.core.types import ModelInputs
from dllm_jax.models import transformer, TransformerConfig
from dllm_jax.parallel import make_mesh, shardings
from dllm_jax.training.optimizer import Optimizer


def _rates(steps, **fields):
  rate = Optimizer(learning_rate=1.0, **fields).learning_rates(steps)
  return np.asarray(jax.jit(jax.vmap(rate))(np.arange(steps)))


def _first(rule):
  """Returns the first update of a rule by parameters and gradients."""
  return jax.jit(lambda params, g: rule.update(g, rule.init(params), params)[0])


def test_warmup_moves_at_the_first_step():
  rates = _rates(8, warmup_steps=4, schedule="constant")
  np.testing.assert_allclose(rates, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1])


def test_cosine_ends_at_the_final_fraction():
  rates = _rates(101, warmup_steps=0, schedule="cosine", final_fraction=0.1)
  assert rates[0] == 1.0
  # Step k of n: f + (1 - f) (1 + cos(pi k / n)) / 2.
  k = np.arange(101)
  expected = 0.1 + 0.9 * (1 + np.cos(np.pi * k / 101)) / 2
  np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_wsd_is_flat_then_linear():
  rates = _rates(
    10, warmup_steps=2, schedule="wsd", decay_steps=4, final_fraction=0.0
  )
  np.testing.assert_allclose(
    rates, [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25], atol=1e-6
  )


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_decay_spares_norms_biases_and_the_process(name):
  params = {
    "model": {
      "q": {
        "kernel": np.ones((4, 4), np.float32),
        "bias": np.ones((4,), np.float32),
      },
      "norm": {"scale": np.ones((4,), np.float32)},
    },
    "process": {"embedding": np.ones((4, 4), np.float32)},
  }
  rule = Optimizer(
    name=name,
    learning_rate=0.5,
    weight_decay=0.5,
    warmup_steps=0,
    schedule="constant",
  ).build(10)
  zeros = {
    "model": {
      "q": {
        "kernel": np.zeros((4, 4), np.float32),
        "bias": np.zeros((4,), np.float32),
      },
      "norm": {"scale": np.zeros((4,), np.float32)},
    },
    "process": {"embedding": np.zeros((4, 4), np.float32)},
  }
  updates = _first(rule)(params, zeros)
  after = optax.apply_updates(params, updates)
  assert float(after["model"]["q"]["kernel"][0, 0]) < 1.0
  assert float(after["model"]["q"]["bias"][0]) == 1.0
  assert float(after["model"]["norm"]["scale"][0]) == 1.0
  assert float(after["process"]["embedding"][0, 0]) == 1.0


def test_decay_is_in_proportion_to_the_rate():
  params = {
    "layers": {"mlp": {"up": {"kernel": np.ones((2, 3, 4), np.float32)}}}
  }
  zeros = jax.tree.map(np.zeros_like, params)
  for name in ("adamw", "lion", "adafactor", "muon"):
    rule = Optimizer(
      name=name,
      learning_rate=0.1,
      weight_decay=0.5,
      warmup_steps=0,
      schedule="constant",
    ).build(10)
    updates = _first(rule)(params, zeros)
    np.testing.assert_allclose(
      jax.tree.leaves(updates)[0], -0.05, rtol=1e-5, err_msg=name
    )


def test_muon_orthogonalises_each_layer_and_expert_alone():
  shapes = {
    "attention": {
      "q": {"kernel": (2, 16, 2, 3)},
      "o": {"kernel": (2, 2, 3, 16)},
    },
    "mlp": {"experts": {"up": (2, 3, 16, 4)}, "router": {"kernel": (2, 16, 3)}},
  }
  matrices = {"q": (16, 6), "o": (6, 16), "up": (16, 4), "router": (16, 3)}
  leaf = lambda x: isinstance(x, tuple)
  keys = iter(jax.random.split(jax.random.key(0), 8))
  draw = lambda shape: jax.random.normal(next(keys), shape)
  params = {
    "embed": {"embedding": draw((5, 16))},
    "layers": jax.tree.map(draw, shapes, is_leaf=leaf),
  }
  rule = Optimizer(
    name="muon",
    learning_rate=1.0,
    warmup_steps=0,
    schedule="constant",
    clip_norm=0.0,
  ).build(10)
  # Layers of very different gradients: together, the larger would rule.
  scale = lambda g: g.at[0].multiply(1e3)
  gradients = params | {"layers": jax.tree.map(scale, params["layers"])}
  updates = _first(rule)(params, gradients)
  for path, update in jax.tree_util.tree_leaves_with_path(updates["layers"]):
    name = path[-2].key if path[-1].key == "kernel" else path[-1].key
    rows, columns = matrices[name]
    for matrix in update.reshape(-1, rows, columns):
      values = np.linalg.svd(matrix / (0.2 * max(rows, columns) ** 0.5))[1]
      # For singular values from 0.02 to 1 of the norm, the five steps' quintic
      # has 0.68 to 1.14.
      assert values.min() > 0.6 and values.max() < 1.3, (name, values)
  # Adam's first update has one size everywhere, against the gradient.
  first, gradient = updates["embed"]["embedding"], params["embed"]["embedding"]
  np.testing.assert_array_equal(np.sign(first), -np.sign(gradient))
  assert np.ptp(np.abs(first)) < 1e-4


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
@pytest.mark.few(2)
def test_state_lies_as_its_parameters_do(name):
  """Nothing is computed: shapes alone say where statistics lie."""
  network = transformer(
      TransformerConfig(
          vocab_size=300, width=256, layers=2, heads=4, mlp_dim=512, experts=4
      )
  )  # fmt: skip
  ids = jax.ShapeDtypeStruct((8, 8), jnp.int32)
  inputs = ModelInputs(latent=ids, positions=ids, segment_ids=ids)
  params = {"model": jax.eval_shape(network.init, jax.random.key(0), inputs)}
  state = jax.eval_shape(Optimizer(name=name).build(10).init, params)
  mesh = make_mesh({"fsdp": 2, "tensor": 2, "expert": 2})
  placed = shardings({"params": params, "opt_state": state}, mesh)
  flat = lambda tree: {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  own, shapes = flat(placed["params"]), flat(params)
  seen = factored = 0
  for path, sharding in flat(placed["opt_state"]).items():
    size = flat(state)[path].shape
    parameter = next((p for p in own if path.endswith(p)), None)
    if parameter is None or size == (1,):
      assert np.prod(size) < 10, path  # counters, placeholders
    elif size == shapes[parameter].shape:
      assert sharding == own[parameter], path
      seen += 1
    else:
      whole, spec = shapes[parameter].shape, own[parameter].spec
      spec = (*spec, *[None] * (len(whole) - len(spec)))
      legal = {
        spec[:i] + spec[i + 1 :]
        for i in range(len(whole))
        if whole[:i] + whole[i + 1 :] == size
      }
      assert tuple(sharding.spec) in legal, path
      factored += any(sharding.spec)
  assert seen >= len(own) * {"adamw": 2, "adafactor": 0}.get(name, 1)
  assert (factored >= 8) == (name == "adafactor")


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"name": "sgd"}, "adamw, lion"),
    ({"schedule": "square"}, "constant, cosine, wsd"),
    ({"learning_rate": 0.0}, "above 0"),
  ],
)
def test_bad_fields_say_what_is_legal(fields, words):
  with pytest.raises(ValueError, match=words):
    Optimizer(**fields)

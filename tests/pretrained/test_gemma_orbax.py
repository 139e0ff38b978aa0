"""Checkpoints of google-deepmind/gemma, written here by Orbax in its layout."""

import dataclasses
import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dllm_jax.pretrained import families, load_pretrained
from dllm_jax.pretrained.fields import Fields
from dllm_jax.pretrained.layouts import gemma_jax
from dllm_jax.pretrained.networks import gemma as network_of
from tests import golden_cases
from tests.sampling import published

NAME = "diffusion_gemma_loss"


def config():
  return golden_cases.load(NAME).config["hf_config"]


def tree():
  """Returns a case's tensors as the parameters of gemma's own modules.

  Its layout is written down by hand: `tests/golden/diffusion_gemma_orbax` has the
  names and shapes that those modules make.
  """
  theirs, text = golden_cases.weights(NAME), config()["text_config"]
  of = lambda name: theirs["model.decoder." + name]
  heads, width = text["num_attention_heads"], text["hidden_size"]

  def perceptron(where):
    gates = [of(f"{where}.{x}_proj.weight") for x in ("gate", "up")]
    down = of(f"{where}.down_proj.weight")
    return {"gating_einsum": np.stack(gates), "linear": down.T}

  def by_head(matrix, count):
    return matrix.reshape(count, -1, width).transpose(0, 2, 1)

  def layer(i):
    own = lambda name: of(f"layers.{i}.{name}")
    norm = lambda name: {"scale": own(name + ".weight")}
    full = text["layer_types"][i] == "full_attention"
    groups = text["num_key_value_heads"]
    groups = text["num_global_key_value_heads"] if full else groups
    keys = by_head(own("self_attn.k_proj.weight"), groups)
    if full:
      kept = {"k_einsum": {"w": keys}}
    else:
      values = by_head(own("self_attn.v_proj.weight"), groups)
      kept = {"kv_einsum": {"w": np.stack([keys, values])}}
    out = own("self_attn.o_proj.weight").T
    attn = {
      "q_einsum": {"w": by_head(own("self_attn.q_proj.weight"), heads)},
      "attn_vec_einsum": {"w": out.reshape(heads, -1, width)},
      "query_norm": norm("self_attn.q_norm"),
      "key_norm": norm("self_attn.k_norm"),
    }
    fused = own("experts.gate_up_proj")
    experts = {
      "router_logits": {"w": own("router.proj.weight").T},
      "router_scale": own("router.scale"),
      "per_expert_scale": own("router.per_expert_scale"),
      "gating_einsum": {"w": fused.reshape(len(fused), 2, -1, width)},
      "linear": {"w": own("experts.down_proj").transpose(0, 2, 1)},
    }
    return {
      "pre_attention_norm": norm("input_layernorm"),
      "skip_scale": own("layer_scalar"),
      "attn": attn | kept,
      "post_attention_norm": norm("post_attention_layernorm"),
      "pre_ffw2_norm": norm("pre_feedforward_layernorm"),
      "mlp2": perceptron(f"layers.{i}.mlp"),
      "post_ffw2_norm": norm("post_feedforward_layernorm_1"),
      "pre_ffw_norm": norm("pre_feedforward_layernorm_2"),
      "mlp": experts,
      "post_ffw1_norm": norm("post_feedforward_layernorm_2"),
      "post_ffw_norm": norm("post_feedforward_layernorm"),
    }

  conditioner = {
    "pre_norm": {"scale": of("self_conditioning.pre_norm.weight")},
    "ffw": perceptron("self_conditioning"),
  }
  layers = {f"layer_{i}": layer(i) for i in range(len(text["layer_types"]))}
  return layers | {
    "embedder": {"input_embedding": of("embed_tokens.weight")},
    "final_norm": {"scale": of("norm.weight")},
    "self_conditioner": conditioner,
  }


def flat(nested):
  """Returns a tree with its modules' paths as keys, as older files have it."""
  made = {}
  for keys, leaf in jax.tree_util.tree_leaves_with_path(nested):
    path = [str(key.key) for key in keys]
    # Perceptrons keep their matrices as "w" there.
    path += ["w"] if path[-1] in ("gating_einsum", "linear") else []
    made.setdefault("/".join(["transformer", *path[:-1]]), {})[path[-1]] = leaf
  return made


def write(folder, nested, *, config=None):
  checkpointer = ocp.StandardCheckpointer()
  checkpointer.save(folder, jax.tree.map(np.ascontiguousarray, nested))
  checkpointer.close()
  if config is not None:
    (folder / "config.json").write_text(json.dumps(config))
  return folder


def same(found, want):
  jax.tree.map(np.testing.assert_array_equal, found, want)


@pytest.mark.all
@pytest.mark.parametrize(
  "form", [lambda x: x, pytest.param(flat, marks=pytest.mark.all)]
)
def test_a_checkpoint_is_the_published_folder(form, tmp_path):
  folder = write(tmp_path / "orbax", form(tree()), config=config())
  model = load_pretrained(folder)
  want = published.model(NAME)
  assert model.config == want.config and model.objective == want.objective
  same(model.params, want.params)


def shapes(experts=8):
  """Returns the shapes of a checkpoint's arrays, with as many experts."""
  found = jax.tree_util.tree_leaves_with_path(tree())
  own = config()["text_config"]["num_experts"]
  swapped = lambda shape: tuple(experts if n == own else n for n in shape)
  return {
    "/".join(str(key.key) for key in keys): swapped(leaf.shape)
    for keys, leaf in found
  }


def test_the_tree_is_that_of_gemmas_own_modules():
  path = golden_cases.ROOT / "diffusion_gemma_orbax" / "config.json"
  if not path.is_file():
    pytest.skip("this root has no recorded tree")
  own = config()["text_config"]["num_experts"]
  recorded = json.loads(path.read_text())["arrays"]
  assert {k: list(v) for k, v in shapes(own).items()} == recorded


@pytest.mark.all
def test_a_config_is_made_of_shapes_and_published_numbers():
  made = Fields(gemma_jax.config(shapes(), "folder"), "config.json")
  assert families.find(made).name == "diffusion_gemma"
  said = {"window": 1024, "softcap": 30.0, "experts": 8, "experts_per_token": 8}
  want = dataclasses.replace(published.model(NAME).config, **said)
  assert network_of(made) == want
  assert families.objective(
    families.find(made), made, want.vocab_size, families.Ids(None)
  ).canvas == 256  # fmt: skip


def without(part):
  return lambda s: {k: v for k, v in s.items() if not k.startswith(part)}


@pytest.mark.parametrize(
  ("change", "words"),
  [
    (without("self_conditioner"), "holds an autoregressive Gemma"),
    (without("layer"), "holds no Gemma"),
    (lambda s: s | {"layer_0/attn/lora/a": (3, 4)}, "lora/a has no place"),
    (
      lambda s: s | {"transformer/stacked_layers/attention_type_0/x/w": (3,)},
      "layers stacked",
    ),
    (lambda s: shapes(4), "experts_per_token 8 is more than the 4 experts"),
  ],
)
def test_other_checkpoints_are_refused(change, words):
  given = change(shapes())
  with pytest.raises(ValueError, match=words):
    gemma_jax.config(given, "folder")
    list(gemma_jax.tensors(given, "folder"))


def test_what_reads_pictures_is_left_out_by_name():
  more = shapes() | {"vision_encoder/entry/w": (3, 4)}
  with pytest.warns(UserWarning, match="vision_encoder/entry.* left out"):
    made = {one.name for one in gemma_jax.tensors(more, "folder")}
  assert made == {one.name for one in gemma_jax.tensors(shapes(), "folder")}

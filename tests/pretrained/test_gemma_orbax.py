"""Checkpoints of google-deepmind/gemma, written here by Orbax in its layout."""

import json

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dllm_jax.pretrained import load_pretrained
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


@pytest.mark.parametrize(
  "form", [lambda x: x, pytest.param(flat, marks=pytest.mark.all)]
)
def test_a_checkpoint_is_the_published_folder(form, tmp_path):
  folder = write(tmp_path / "orbax", form(tree()), config=config())
  model = load_pretrained(folder)
  want = published.model(NAME)
  assert model.config == want.config and model.objective == want.objective
  same(model.params, want.params)

"""Which family a config is of, and what of it nobody may ignore."""

import json
import pathlib

import pytest

import dllm_jax
from dllm_jax.models import rotary
from dllm_jax.pretrained import families
from dllm_jax.pretrained.fields import Fields
from tests import golden_cases
from tests.pretrained.golden import publish, published_config

LLAMA = {
  "model_type": "llama", "architectures": ["LlamaForCausalLM"],
  "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2,
  "num_attention_heads": 4, "intermediate_size": 48,
  "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
}  # fmt: skip
QWEN_MOE = LLAMA | {
  "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
  "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8,
  "norm_topk_prob": True,
}  # fmt: skip


def read(config):
  fields = Fields(config, pathlib.Path("config.json"))
  family = families.find(fields)
  network = family.network(fields)
  family.settings(fields)
  families.check_fields(family, fields)
  return family, network


def auto(name):
  return {"AutoModelForCausalLM": name, "AutoConfig": "configuration_x.XConfig"}


# inclusionAI's LLaDA-MoE is published with LLaDA's own model_type.
def test_architectures_come_before_model_types():
  moe = published_config(golden_cases.load("llada_moe"))
  published = moe | {
    "model_type": "llada",
    "auto_map": auto("modeling_lladamoe.LLaDAMoEModelLM"),
  }
  assert read(published)[0].name == "llada_moe"
  assert read(moe | {"model_type": None})[0].name == "llada_moe"
  bare = published | {"architectures": ["LLaDAMoEModel"]}
  assert read(bare)[0].name == "llada_moe"
  names = {"architectures": None, "auto_map": None}
  assert read(LLAMA | names)[0].name == "llama"


# Models that are named after another (their modelling files, 2026).
@pytest.mark.parametrize(
  ("base", "changes", "said"),
  [
    (
      "llama",
      {"architectures": ["StableDiffcoderForCausalLM"]},
      "its code is StableDiffcoderForCausalLM",
    ),
    (
      "llama",
      {"auto_map": auto("modeling_seed_diffcoder.SeedDiffcoderForCausalLM")},
      "its code is SeedDiffcoderForCausalLM",
    ),
    (
      "llama",  # Its own class's name, in a file of another.
      {"auto_map": auto("modeling_stable_diffcoder.LlamaForCausalLM")},
      "code of its own, modeling_stable_diffcoder",
    ),
    (
      "qwen2",
      {"architectures": ["SDLMQwen2ForCausalLM"]},
      "its code is SDLMQwen2ForCausalLM",
    ),
    (
      "qwen3",
      {"architectures": ["EfficientDLM"], "auto_map": auto("m.EfficientDLM")},
      "its code is EfficientDLM",
    ),
    ("dream", {"architectures": ["DreamForCausalLM"]}, "DreamForCausalLM"),
    ("sdar", {"block_size": 2}, "I-DLM's, which is causal and shifted"),
    ("sdar", {"fuse_cross_entropy": True}, "I-DLM's"),
    ("llada2_moe", {"expert_capacity": 48}, "expert_capacity is LLaDA2.2's"),
    (
      "llama",
      {"auto_map": {"AutoModelForCausalLM": "someone/x--modeling.OtherLM"}},
      "its code is OtherLM",
    ),
  ],
  ids=str,
)
def test_a_model_that_is_named_after_another_is_refused(base, changes, said):
  bases = {
    "llama": LLAMA,
    "qwen2": LLAMA
    | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": LLAMA
    | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "dream": published_config(golden_cases.load("dream_logits")),
    "sdar": published_config(golden_cases.load("sdar")),
    "llada2_moe": published_config(golden_cases.load("llada2_moe")),
  }
  assert read(bases[base])
  with pytest.raises(ValueError, match=said) as error:
    read(bases[base] | changes)
  assert "\n" not in str(error.value)


# What changes a network and is not understood: transformers' own fields.
@pytest.mark.parametrize(
  "changes",
  [
    {"embedding_multiplier": 12.0},
    {"logits_scaling": 8.0},
    {"attn_logit_softcapping": 50.0},
    {"no_rope_layers": [1, 0]},
    {"query_pre_attn_scalar": 224},
    {"quantization_config": {"bits": 4}},
    {"num_nextn_predict_layers": 1},
    {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
    {"layer_types": ["full_attention", "sliding_attention"]},
    {"layer_types": ["linear_attention", "full_attention"]},
    {"sliding_window": 64},
    {"hidden_act": "gelu"},
    {"attention_bias": True},
  ],
  ids=str,
)
def test_a_field_that_changes_the_network_is_never_ignored(changes):
  (name,) = changes
  with pytest.raises(ValueError, match=name):
    read(LLAMA | changes)


def test_what_asks_for_nothing_is_no_matter():
  quiet = {
    "embedding_multiplier": None, "quantization_config": {}, "logits_soft": 0,
    "transformers_version": "5.24.0", "_name_or_path": "x", "use_cache": True,
    "torch_dtype": "bfloat16", "dtype": "bfloat16", "eos_token_id": [1, 2],
    "layer_types": ["full_attention"] * 2, "pretraining_tp": 1,
    "sliding_window": None, "initializer_range": 0.02,
  }  # fmt: skip
  assert read(LLAMA | quiet)[1] == read(LLAMA)[1]


def test_every_recorded_config_is_understood():
  names = ("llada_logits", "dream_logits", "sdar", "llada_moe", "llada2_moe")
  for name in names:
    assert read(published_config(golden_cases.load(name)))


# transformers 5.24.0 writes what rotates under one name.
def test_rope_parameters():
  nested = {"rope_theta": 5e5, "rope_type": "default"}
  plain = read(LLAMA | {"rope_theta": 5e5})[1]
  assert read(LLAMA | {"rope_parameters": nested})[1] == plain
  kinds = {"full_attention": nested, "sliding_attention": {"rope_theta": 1e4}}
  assert read(LLAMA | {"rope_parameters": kinds})[1] == plain
  part = read(
    LLAMA | {"rope_parameters": nested | {"partial_rotary_factor": 0.5}}
  )[1]
  assert part.rotary_dim == 4 and part.rope_theta == 5e5
  assert read(LLAMA | {"partial_rotary_factor": 0.5})[1].rotary_dim == 4
  yarn = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
  network = read(LLAMA | {"rope_parameters": yarn})[1]
  assert network.rope_scaling == rotary.Yarn(factor=4.0, first_length=128)


def test_experts_go_by_either_name():
  one = read(QWEN_MOE | {"num_experts": 4})[1]
  other = read(QWEN_MOE | {"num_local_experts": 4})[1]
  assert one == other and one.experts == 4 and one.qk_norm
  assert one.router_normalised and not one.dense_layers
  dense = QWEN_MOE | {"num_experts": 4, "decoder_sparse_step": 2}
  assert read(dense)[1].dense_layers == (0,)
  assert read(dense | {"mlp_only_layers": [1]})[1].dense_layers == (0, 1)
  with pytest.raises(ValueError, match="lacks the field num_experts"):
    read(QWEN_MOE)
  mixtral = LLAMA | {
    "model_type": "mixtral", "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None,
  }  # fmt: skip
  family, network = read(mixtral)
  assert family.name == "mixtral" and network.expert_dim == 48
  with pytest.raises(ValueError, match="sliding_window"):
    read(mixtral | {"sliding_window": 4096})


# huggingface/diffusers issue 14719: after saving into the same folder, the old
# weights were loaded without a word.
def test_an_index_beside_a_whole_file_is_no_choice(tmp_path):
  source = publish("llada_logits", tmp_path / "in")
  model = dllm_jax.load_pretrained(source)
  both = tmp_path / "both"
  dllm_jax.pretrained.save_pretrained(model, both, shard_bytes=100_000)
  assert dllm_jax.load_pretrained(both)
  (both / "model.safetensors").write_bytes(
    (source / "model.safetensors").read_bytes()
  )
  said = "model.safetensors and, in model.safetensors.index.json.*remove it"
  with pytest.raises(ValueError, match=said):
    dllm_jax.load_pretrained(both)
  # With a shard gone too: the whole file is not hidden.
  next(both.glob("model-00001*")).unlink()
  with pytest.raises(ValueError, match=said):
    dllm_jax.load_pretrained(both)
  # An index may name the whole file itself.
  (both / "model.safetensors.index.json").write_text(
    json.dumps({"weight_map": dict.fromkeys(model.used, "model.safetensors")})
  )
  assert dllm_jax.load_pretrained(both)


# yjyddq/DARE issue 13: two masks, and nothing said so.
def test_masks_that_disagree_are_told(tmp_path):
  source = publish("sdar", tmp_path / "in")
  named = published_config(golden_cases.load("sdar"))["mask_token_id"]
  other = named - 4
  with pytest.warns(
    UserWarning, match=f"names the mask {named}, but the mask {other}"
  ):
    model = dllm_jax.load_pretrained(source, mask_id=other)
  assert model.objective.mask_id == other == model.published["mask_token_id"]
  assert (
    dllm_jax.load_pretrained(source, mask_id=named).objective.mask_id == named
  )

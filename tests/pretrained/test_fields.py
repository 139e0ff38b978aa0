"""What a config says: read, with its neutral value, no matter, or refused."""

import pytest

from dllm_jax.models import rotary
from dllm_jax.pretrained import families
from dllm_jax.pretrained.fields import Fields
from tests import golden_cases
from tests.pretrained.golden import published_config
from tests.pretrained.test_families import auto, LLAMA, read

QWEN_MOE = LLAMA | {
  "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
  "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8,
  "norm_topk_prob": True,
}  # fmt: skip


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
    "embedding_multiplier": None, "quantization_config": {}, "new_field": "",
    "transformers_version": "5.24.0", "_name_or_path": "x", "use_cache": True,
    "torch_dtype": "bfloat16", "dtype": "bfloat16", "eos_token_id": [1, 2],
    "layer_types": ["full_attention"] * 2, "pretraining_tp": 1,
    "sliding_window": None, "initializer_range": 0.02, "use_mrope": False,
    "is_encoder_decoder": False, "add_cross_attention": False,
    "id2label": {"0": "x"}, "rope_interleaved": False, "unsloth_fixed": True,
  }  # fmt: skip
  assert read(LLAMA | quiet)[1] == read(LLAMA)[1]


# False, or 0, may be what changes the network.
@pytest.mark.parametrize(
  "changes",
  [
    {"is_causal": False},
    {"use_rope": False},
    {"attention_scale": 0},
    {"add_cross_attention": True},
    {"use_mrope": True},
    {"rope_interleaved": True},
    {"_sliding_window_pattern": 6},
    {"image_token_id": 9},
  ],
  ids=str,
)
def test_a_switch_that_is_off_may_matter(changes):
  (name,) = changes
  with pytest.raises(ValueError, match=name) as error:
    read(LLAMA | changes)
  assert "\n" not in str(error.value)


# The config.json files that their owners published, of the sizes of ours:
# JetAstra/SDAR@c2041a8 (SDAR-8B-Chat), inclusionAI/dInfer@fce4e32 (the classes of
# LLaDA-MoE and LLaDA2), kuleshov-group's classes of MDLM and BD3-LM.
REAL = {
  "sdar": ("sdar", {
    "auto_map": {
      "AutoConfig": "configuration_sdar.SDARConfig",
      "AutoModel": "modeling_sdar.SDARModel",
      "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
    "attn_implementation": "flex_attention", "bos_token_id": 151643,
    "debug": False, "ep_size": 1, "fuse_cross_entropy": True,
    "max_window_layers": 36, "micro_forward": False, "rope_scaling": None,
    "skip_checkpoint": False, "sliding_window": None, "use_cache": False,
    "torch_dtype": "bfloat16", "transformers_version": "4.52.4",
    "use_deepep": False, "use_sliding_window": False,
  }),
  "llada_moe": ("llada_moe", {
    "model_type": "llada", "clip_qkv": None, "router_num_group": None,
    "router_topk_group": None, "router_aux_loss_coef": 0.01,
    "use_cache": False, "rope_scaling": None, "initializer_range": 0.02,
  }),
  "llada2_moe": ("llada2_moe", {
    "auto_map": {
      "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
      "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
      "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    },
    "moe_router_enable_expert_bias": True, "norm_head": False,
    "norm_softmax": False, "norm_topk_prob": True, "rotary_dim": 64,
    "router_dtype": "fp32", "score_function": "sigmoid", "use_rmsnorm": True,
    "sliding_window": 4096, "use_sliding_window": False,
    "max_window_layers": 28, "output_router_logits": False,
    "num_nextn_predict_layers": 0, "rope_scaling": None,
  }),
  "dream": ("dream_logits", {
    "attention_dropout": 0.0, "hidden_act": "silu", "max_window_layers": 28,
    "rope_scaling": None, "sliding_window": None, "use_mrope": False,
    "use_sliding_window": False, "use_cache": True, "initializer_range": 0.02,
    "auto_map": auto("modeling_dream.DreamModel"), "attention_bias": False,
  }),
  "llada": ("llada_logits", {
    "alibi_bias_max": 8.0, "init_cutoff_factor": None, "init_device": "meta",
    "precision": "amp_bf16", "transformers_version": "4.46.3",
    "auto_map": auto("modeling_llada.LLaDAModelLM"),
  }),
  "mdlm": ("mdlm", {
    "_name_or_path": "kuleshov-group/mdlm-owt", "return_dict": False,
    "torch_dtype": "float32", "auto_map": auto("modeling_mdlm.MDLM"),
  }),
  "bd3lm": ("bd3lm", {
    "attn_backend": "flex", "causal": False, "cross_attn": True,
    "adaln": True, "var_min": True, "sampling_eps_min": 0.001,
    "sampling_eps_max": 1.0, "auto_map": auto("modeling_bd3lm.BD3LM"),
  }),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_what_owners_publish_is_understood(name):
  case, more = REAL[name]
  plain = published_config(golden_cases.load(case))
  family, network = read(plain | more)
  assert family.name == name and network == read(plain)[1]


def test_every_recorded_config_is_understood():
  names = (
    "llada_logits", "dream_logits", "sdar", "llada_moe", "llada2_moe", "mdlm",
    "bd3lm", "sedd_absorb", "sedd_uniform",
  )  # fmt: skip
  for name in names:
    assert read(published_config(golden_cases.load(name)))


# The configs that modules were trained with, and their other choices.
@pytest.mark.parametrize(
  ("case", "section", "changes"),
  [
    ("mdlm", None, {"backbone": "dimamba"}),
    ("mdlm", None, {"parameterization": "d3pm"}),
    ("mdlm", None, {"T": 1000}),
    ("mdlm", "model", {"type": "dimamba"}),
    ("mdlm", "noise", {"type": "geometric"}),
    ("bd3lm", "algo", {"causal_attention": True}),
    ("bd3lm", "algo", {"cross_attn": False}),
    ("bd3lm", "model", {"new": 2}),
    ("sedd_absorb", "graph", {"type": "roulette"}),
    ("sedd_absorb", "model", {"new": 0}),
  ],
  ids=str,
)
def test_training_configs(case, section, changes):
  config = golden_cases.load(case).config["config"]
  if case != "sedd_absorb":
    config = config | {"vocab_size": 50}
  assert read(config)
  (name,) = changes
  changed = {section: config[section] | changes} if section else changes
  if name == "parameterization":  # By which it is found.
    name = "unknown"
  with pytest.raises(ValueError, match=name):
    read(config | changed)


def test_what_an_algorithm_is_told():
  config = golden_cases.load("bd3lm").config["config"] | {"vocab_size": 50}
  algo = config["algo"] | {"time_conditioning": True}
  fields = Fields(config | {"algo": algo}, "config.json")
  assert families.find(fields).settings(fields) == {
    "block_size": config["block_size"],
    "time_conditioning": True,
  }


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


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
    (
      {
        "partial_rotary_factor": 1.0,
        "rope_parameters": {"partial_rotary_factor": 0.5},
      },
      "partial_rotary_factor is 1.0, but 0.5 in rope_parameters",
    ),
    (
      {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "factor": 4.0},
      },
      "factor is 2.0 in rope_scaling, but 4.0 in rope_parameters",
    ),
    (
      {"rope_parameters": {"sliding_attention": {"rope_theta": 1e4}}},
      "sliding_attention",
    ),
    (
      {
        "rope_parameters": {
          "full_attention": {"rope_theta": 1e4},
          "mrope_section": [1, 1, 2],
        }
      },
      "full_attention",
    ),
    (
      {"rope_parameters": {"full_attention": {"rope_type": "longrope"}}},
      "'longrope' is not supported",
    ),
    ({"layer_types": ["full_attention"]}, "names 1 layers"),
  ],
  ids=str,
)
def test_what_rotates_is_said_once(changes, said):
  with pytest.raises(ValueError, match=said):
    read(LLAMA | changes)


# Their classes' own defaults (transformers 5.24.0).
def test_defaults_of_a_family():
  assert read(LLAMA)[1].rope_theta == 1e4
  qwen = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
  assert read(LLAMA | qwen)[1].head_dim == 128
  mixtral = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
  experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
  assert read(LLAMA | mixtral | experts)[1].rope_theta == 1e6


def test_experts_go_by_either_name():
  one = read(QWEN_MOE | {"num_experts": 4})[1]
  other = read(QWEN_MOE | {"num_local_experts": 4})[1]
  assert one == other and one.experts == 4 and one.qk_norm
  assert one.router_normalised and not one.dense_layers
  dense = QWEN_MOE | {"num_experts": 4, "decoder_sparse_step": 2}
  assert read(dense)[1].dense_layers == (0,)
  assert read(dense | {"mlp_only_layers": [1]})[1].dense_layers == (0, 1)
  with pytest.raises(ValueError, match="4, but num_local_experts 8"):
    read(QWEN_MOE | {"num_experts": 4, "num_local_experts": 8})
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

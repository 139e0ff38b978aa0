"""Which family a config is of, whatever it calls itself."""

import pathlib

import pytest

import dllm_jax
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
  # Without a model_type the architecture still decides, and all is checked.
  qwen = {"architectures": ["Qwen3ForCausalLM"], "model_type": None}
  assert read(LLAMA | qwen)[1].qk_norm
  with pytest.raises(ValueError, match="embedding_multiplier"):
    read(LLAMA | qwen | {"embedding_multiplier": 12.0})


def test_a_bare_network_may_stand_beside_its_own():
  for name, case, model, whole in (
    ("llada2_moe", "llada2_moe", "LLaDA2MoeModel", "LLaDA2MoeModelLM"),
    ("sdar", "sdar", "SDARModel", "SDARForCausalLM"),
  ):
    code = {"AutoModel": f"m.{model}", "AutoModelForCausalLM": f"m.{whole}"}
    published = published_config(golden_cases.load(case))
    assert read(published | {"auto_map": code})[0].name == name


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
    ("sdar", {"block_size": 1}, "I-DLM's, which is causal and shifted"),
    ("sdar", {"block_size": 3, "fuse_cross_entropy": True}, "I-DLM's"),
    ("sdar", {"use_regular_causal": True}, "the field use_regular_causal"),
    ("llama", {"model_type": "gemma"}, "'gemma', but architectures LlamaFor"),
    ("qwen3", {"model_type": "qwen2"}, "name Qwen 2 and Qwen 3"),
    ("llama", {"is_causal": False}, "is_causal=False is not supported"),
    ("qwen2", {"causal_attn": False}, "the field causal_attn=False"),
    ("qwen2", {"text_mask_token_id": 63}, "the field text_mask_token_id"),
    ("llada2_moe", {"split_token_id": 9}, "the field split_token_id"),
    ("llada", {"architectures": ["MMadaModelLM"]}, "MMadaModelLM: MMaDA"),
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
    "llada": published_config(golden_cases.load("llada_logits")),
    "sdar": published_config(golden_cases.load("sdar")),
    "llada2_moe": published_config(golden_cases.load("llada2_moe")),
  }
  assert read(bases[base])
  with pytest.raises(ValueError, match=said) as error:
    read(bases[base] | changes)
  assert "\n" not in str(error.value)


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

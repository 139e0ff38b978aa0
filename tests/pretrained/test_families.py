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
    ("sdar", {"use_regular_causal": True}, "the field use_regular_causal"),
    ("llama", {"model_type": "gemma"}, "'gemma', but architectures LlamaFor"),
    ("qwen3", {"model_type": "qwen2"}, "name Qwen 2 and Qwen 3"),
    ("llama", {"is_causal": False}, "is_causal=False is not supported"),
    ("qwen2", {"causal_attn": False}, "the field causal_attn=False"),
    ("qwen2", {"text_mask_token_id": 63}, "the field text_mask_token_id"),
    ("llada2_moe", {"split_token_id": 9}, "the field split_token_id"),
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


# Names that two families share: the code decides, a field, or who asks.
def test_families_of_one_name_are_told_apart():
  diffcoder = {"architectures": ["StableDiffcoderForCausalLM"]}
  seed = {"auto_map": auto("modeling_seed.SeedDiffcoderForCausalLM")}
  for changes in (diffcoder, seed):
    assert read(LLAMA | changes)[0].name == "stable_diffcoder"
  reasoner = published_config(golden_cases.load("dreamreasoner"))
  assert read(reasoner)[0].name == "dream_reasoner"
  assert read(reasoner | {"model_type": None})[0].name == "dream_reasoner"
  dream = published_config(golden_cases.load("dream_logits"))
  assert read(dream)[0].name == "dream"
  edits = published_config(golden_cases.load("llada22"))
  assert read(edits)[0].name == "llada22"
  none = {"expert_capacity", "delete_token_id", "split_token_id"}
  plain = {k: v for k, v in edits.items() if k not in none}
  assert read(plain)[0].name == "llada2_moe"
  with pytest.raises(ValueError, match="n_group=4 is not supported"):
    read(edits | {"n_group": 4})


def test_idlm_and_sdar_are_told_apart_by_the_caller():
  sdar = published_config(golden_cases.load("sdar"))
  assert read(sdar)[0].name == "sdar"
  said = {"diffusion_objective": "idlm"}
  assert read(sdar | said)[0].name == "idlm"
  small = sdar | {"block_size": 3, "fuse_cross_entropy": True}
  with pytest.warns(UserWarning, match="SDAR's .* or I-DLM's .*--as=idlm"):
    family, _ = read(small)
  assert family.name == "idlm"
  assert read(small | {"diffusion_objective": "sdar"})[0].name == "sdar"
  for name in ("sdar", "idlm"):  # as --as says
    told = families.as_told(small, name, "config.json")
    assert families.find(told).name == name
  qwen = LLAMA | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
  with pytest.raises(ValueError, match="'qwen3', and idlm's is 'sdar': leave"):
    families.as_told(qwen, "idlm", "config.json")


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

"""The published sizes, without their weights: shapes, counts and shardings."""

import math

import jax
import pytest

from dllm_jax.core.types import ModelInputs
from dllm_jax.models import rotary
from dllm_jax.parallel.sharding import shardings
from dllm_jax.pretrained import families, networks, table, tokens

QWEN = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6}
LLADA2 = {
  "model_type": "llada2_moe",
  "vocab_size": 157184,
  "num_key_value_heads": 4,
  "head_dim": 128,
  "num_experts": 256,
  "num_shared_experts": 1,
  "num_experts_per_tok": 8,
  "n_group": 8,
  "topk_group": 4,
  "first_k_dense_replace": 1,
  "routed_scaling_factor": 2.5,
  "partial_rotary_factor": 0.5,
  "rope_theta": 600_000,
  "rms_norm_eps": 1e-6,
  "pad_token_id": 156892,
  "max_position_embeddings": 16384,
}
CONFIGS = {
  "LLaDA-8B": {
    "model_type": "llada",
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "vocab_size": 126464,
    "embedding_size": 126464,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_sequence_length": 4096,
    "mask_token_id": 126336,
  },
  "Dream-7B": QWEN
  | {
    "model_type": "Dream",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "mask_token_id": 151666,
  },
  "SDAR-8B": QWEN
  | {
    "model_type": "sdar",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "mask_token_id": 151669,
  },
  "LLaMA-3.1-8B": {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
      "factor": 8.0,
      "low_freq_factor": 1.0,
      "high_freq_factor": 4.0,
      "original_max_position_embeddings": 8192,
      "rope_type": "llama3",
    },
    "eos_token_id": [128001, 128008, 128009],
  },
  "Qwen3-30B-A3B": QWEN
  | {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
  },
  "Mixtral-8x7B": {
    "model_type": "mixtral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "vocab_size": 32000,
  },
  "LLaDA2-mini": LLADA2
  | {
    "hidden_size": 2048,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
  },
  "LLaDA2-flash": LLADA2
  | {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
  },
}


def llada2(layers, width, heads, dense, expert):
  """Returns the parameters of LLaDA2, summed by its published tensors."""
  attention = (heads + 8) * 128 * width + heads * 128 * width + 2 * 128
  routed = 257 * 3 * width * expert + 256 * width + 256  # with their biases
  every = attention + 2 * width
  rest = 2 * 157184 * width + width
  return layers * every + 3 * width * dense + (layers - 1) * routed + rest


COUNTS = {
  "LLaDA-8B": 8_015_581_184,
  "Dream-7B": 7_615_616_512,
  "SDAR-8B": 8_190_735_360,
  "LLaMA-3.1-8B": 8_030_261_248,
  "Qwen3-30B-A3B": 30_532_122_624,
  "Mixtral-8x7B": 46_702_792_704,
  "LLaDA2-mini": llada2(20, 2048, 16, 5120, 512),
  "LLaDA2-flash": llada2(32, 4096, 32, 9216, 1024),
}


def resolved(name):
  fields = families.Fields(CONFIGS[name], "config.json")
  family = families.find(fields)
  return family, fields, family.network(fields)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.few(2)
def test_counts(name):
  family, fields, config = resolved(name)
  assert table.parameters(family.table, config) == COUNTS[name]
  assert config.vocab_size == config.padded_vocab  # nothing is added to these
  special = tokens.ids(family, fields, config.vocab_size, families.Ids(None))
  objective = families.objective(family, fields, config.vocab_size, special)
  if not family.adopts:
    assert special.mask == fields.get("mask_token_id", default=156895)
    assert objective.mask_id == special.mask


def scaled(**scaling):
  """Returns the network of LLaMA with another scaling of its positions."""
  fields = CONFIGS["LLaMA-3.1-8B"] | {
    "rope_scaling": None,
    "max_position_embeddings": 4096,
    **scaling,
  }
  return networks.llama(families.Fields(fields, "config.json"))


def test_scaled_positions():
  _, _, config = resolved("LLaMA-3.1-8B")
  assert config.rope_scaling == rotary.Llama3(
    factor=8.0, first_length=8192, low=1.0, high=4.0
  )
  # As Qwen says to write it, and as newer folders have it.
  yarn = {"type": "yarn", "factor": 4.0}
  ours = scaled(rope_scaling=yarn | {"original_max_position_embeddings": 32768})
  assert ours.rope_scaling == rotary.Yarn(factor=4.0, first_length=32768)
  newer = {"rope_type": "linear", "factor": 2, "rope_theta": 7.0}
  ours = scaled(rope_parameters=newer, rope_theta=None)
  assert ours.rope_scaling == rotary.Linear(factor=2.0) and ours.rope_theta == 7
  both = yarn | {"mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}
  ours = scaled(rope_scaling=both).rope_scaling
  assert ours.first_length == 4096 and not ours.whole
  log = 0.1 * math.log(4.0)
  assert math.isclose(ours.magnitude(), (log + 1) / (log / 2 + 1))


@pytest.mark.parametrize("given, message", [
    ({"rope_type": "longrope"}, "'longrope' is not supported; legal: default,"),
    ({"rope_type": "llama3", "factor": 8}, "lacks the field original_max"),
    ("llama3", "lacks the section rope_scaling"),
    ({"rope_type": "linear", "factor": "2"}, "factor must be a number"),
])  # fmt: skip
def test_scalings_that_are_refused(given, message):
  with pytest.raises(ValueError, match=message):
    scaled(rope_scaling=given)


@pytest.mark.all
@pytest.mark.parametrize("name", CONFIGS)
def test_sharded_on_a_pod(name):
  family, _, config = resolved(name)
  expert = 8 if config.experts else 1
  mesh = jax.sharding.AbstractMesh(
    (1, 8, 4, 1, expert),
    ("data", "fsdp", "tensor", "context", "expert"),
    axis_types=(jax.sharding.AxisType.Auto,) * 5,
  )
  shapes = table.shapes(family.table, config)
  placed = shardings(shapes, mesh)  # refuses a large replicated parameter
  local = sum(
    math.prod(placed[path].shard_shape(leaf.shape))
    for path, leaf in shapes.items()
  )
  routed = sum(x.size for path, x in shapes.items() if "/experts/" in path)
  # Experts by three axes, the rest by two; norms and routers, less divided,
  # are under a fiftieth.
  share = routed / (32 * expert) + (COUNTS[name] - routed) / 32
  assert share <= local < 1.02 * share

  rows = jax.ShapeDtypeStruct((8 * expert, 64), "int32")
  inputs = ModelInputs(latent=rows, positions=rows, segment_ids=rows)
  tree = jax.eval_shape(
    family.table.network(config).init, jax.random.key(0), inputs
  )
  with jax.sharding.use_abstract_mesh(mesh):
    out, _ = jax.eval_shape(family.table.network(config).apply, tree, inputs)
  assert out.hidden.shape == (8 * expert, 64, config.width)
  assert out.unembed.shape == (config.width, config.padded_vocab)

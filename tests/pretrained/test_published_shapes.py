"""The published sizes, without their weights: shapes, counts and shardings."""

import math

import jax
import pytest

from dllm_jax.core.types import ModelInputs
from dllm_jax.parallel.sharding import shardings
from dllm_jax.pretrained import families, table

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
  "LLaDA2-mini": llada2(20, 2048, 16, 5120, 512),
  "LLaDA2-flash": llada2(32, 4096, 32, 9216, 1024),
}


def resolved(name):
  fields = families.Fields(CONFIGS[name], "config.json")
  family = families.find(fields)
  return family, fields, family.network(fields)


@pytest.mark.parametrize("name", CONFIGS)
def test_counts(name):
  family, fields, config = resolved(name)
  assert table.parameters(family.table, config) == COUNTS[name]
  assert config.vocab_size == config.padded_vocab  # nothing is added to these
  special = families.ids(family, fields, config.vocab_size, families.Ids(None))
  assert special.mask == fields.get("mask_token_id", default=156895)
  objective = families.objective(family, fields, config.vocab_size, special)
  assert objective.mask_id == special.mask


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

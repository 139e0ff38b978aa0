"""LLaDA2.0 mini, block diffusion over experts: 16B parameters, 1.4B a token.

20 layers of width 2048, the first with a plain perceptron, the others with 8 of 256
experts and a shared one; blocks of 32 (arXiv:2512.15745). The published model comes
from an autoregressive one, whose weights `dllm convert` reads. Batch and schedule
are ours. Prepare data with the published tokenizer, whose mask has id 156895.

    dllm train --config=configs/llada2_mini.py:h200:8x8 --workdir=runs/llada2 \
        --config.data.path=tokens
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the defaults."""
  return ConfigDict({
    "vocab_size": 157_184,
    "data": {"path": "tokens", "length": 4096},
    "objective": {"name": "bd3lm", "block_size": 32},
    "model": {
      "width": 2048,
      "layers": 20,
      "heads": 16,
      "kv_heads": 4,
      "head_dim": 128,
      "mlp_dim": 5120,
      "qk_norm": True,
      "rope_theta": 600_000.0,
      "rotary_dim": 64,
      "norm_eps": 1e-6,
      "dense_layers": (0,),
      "experts": 256,
      "experts_per_token": 8,
      "expert_dim": 512,
      "shared_dim": 512,
      "router": "sigmoid",
      "router_bias": True,
      "router_groups": 8,
      "router_top_groups": 4,
      "router_normalised": True,
      "router_scale": 2.5,
      "balance_weight": 1e-3,
      "dtype": "bfloat16",
      "remat": "full",
    },
    "optimizer": {
      "learning_rate": 1e-4,
      "schedule": "wsd",
      "warmup_steps": 2000,
      "decay_steps": 10_000,
      "b2": 0.95,
      "weight_decay": 0.1,
    },
    "training": {"steps": 100_000, "batch_size": 512},
    "checkpoint": {"every_steps": 1000},
    "sampler": {"preset": "llada2"},
    "machines": {
      "v5p:4x4x8": {
        "mesh": {"data": 1, "fsdp": 128},
        "model": {
          "attention": "splash",
          "remat": "dots",
        },
        "training": {"microbatches": 1},
      },
      "v6e:16x16": {
        "mesh": {"data": 1, "fsdp": 256},
        "model": {
          "attention": "splash",
          "remat": "dots",
        },
        "training": {"microbatches": 1},
      },
      "h200:1x8": {
        "mesh": {"data": 1, "fsdp": 8},
        "model": {"attention": "flash", "remat": "dots"},
        "training": {"microbatches": 8},
      },
      "h200:8x8": {
        "mesh": {"data": 1, "fsdp": 64},
        "model": {"attention": "flash", "remat": "dots"},
        "training": {"microbatches": 1},
      },
    },
  })

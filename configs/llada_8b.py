"""LLaDA 8B, pre-training: published MMLU 65.9, GSM8K 70.3 (base model).

2.3T tokens at length 4096, batch 1280, learning rate 4e-4 held constant and lowered
at the end, weight decay 0.1; 0.13M H800 hours (arXiv:2502.09992). Prepare data with
the published tokenizer, whose mask has id 126336.

    dllm train --config=configs/llada_8b.py:v5p:4x4x8 --workdir=runs/llada \
        --config.data.path=tokens
"""

from ml_collections import ConfigDict


def _machine(attention: str, *, fsdp: int, parts: int) -> dict:
  """Returns what changes on a machine: found by `dllm plan --search`."""
  return {
    "mesh": {"data": 1, "fsdp": fsdp},
    "model": {"attention": attention, "remat": "dots"},
    "training": {"batch_size": 1024, "microbatches": parts},
  }


def get_config() -> ConfigDict:
  """Returns what differs from the defaults."""
  return ConfigDict({
    "vocab_size": 126_464,
    "data": {"path": "tokens", "length": 4096},
    "objective": {"name": "llada", "random_length": 0.01},
    "model": {
      "width": 4096,
      "layers": 32,
      "heads": 32,
      "mlp_dim": 12_288,
      "rope_theta": 500_000.0,
      "norm_eps": 1e-5,
      "dtype": "bfloat16",
      "remat": "full",
    },
    "optimizer": {
      "learning_rate": 4e-4,
      "schedule": "wsd",
      "warmup_steps": 2000,
      "decay_steps": 60_000,
      "b2": 0.95,
      "weight_decay": 0.1,
    },
    "training": {"steps": 440_000, "batch_size": 1280},
    "checkpoint": {"every_steps": 2000},
    "sampler": {"preset": "llada"},
    "machines": {
      "v5p:4x4x8": _machine("splash", fsdp=128, parts=2),
      "v6e:16x16": _machine("splash", fsdp=256, parts=2),
      "h200:1x8": _machine("cudnn", fsdp=8, parts=32),
      "h200:8x8": _machine("cudnn", fsdp=64, parts=4),
    },
  })

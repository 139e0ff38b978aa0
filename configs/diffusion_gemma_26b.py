r"""DiffusionGemma 26B-A4B: its published shape, for fine-tuning and for plans.

30 layers, 5 that see a window of 1024 tokens to each that sees all; 128 experts of
which a token has 8, beside a perceptron that all have; canvases of 256 tokens. An
import has the shape by itself:

    dllm convert --from_hf=diffusiongemma-26B-A4B-it --workdir=runs/chat \
        --dtype=bfloat16
    dllm plan --config=diffusion_gemma_26b --topology=h200:1x8
    dllm plan --config=diffusion_gemma_26b --topology=h200:1x8 \
        --config.model.adapter.rank=16
    dllm plan --config=diffusion_gemma_26b --topology=h200:1x1 --program=sample
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the defaults."""
  return ConfigDict({
    "vocab_size": 262_145,  # and one for a mask, which is left out
    "data": {"path": "chats.jsonl", "length": 1024},
    "objective": {"name": "diffusion_gemma", "canvas": 256},
    "model": {
      "name": "gemma",
      "width": 2816,
      "layers": 30,
      "heads": 16,
      "kv_heads": 8,
      "head_dim": 256,
      "full_kv_heads": 2,
      "full_head_dim": 512,
      "window": 1024,
      "mlp_dim": 2112,
      "experts": 128,
      "experts_per_token": 8,
      "expert_dim": 704,
      "softcap": 30.0,
      "dtype": "bfloat16",
      "param_dtype": "bfloat16",
      "remat": "full",
    },
    "optimizer": {"learning_rate": 1e-5, "warmup_steps": 100},
    "training": {"steps": 2000, "batch_size": 64},
    "checkpoint": {"every_steps": 200},
    "sampler": {"preset": "diffusion_gemma"},
    "machines": {
      "v5p:4x4x4": {"mesh": {"data": 1, "fsdp": 64}},
      "v6e:8x8": {"mesh": {"data": 1, "fsdp": 64}},
      "h200:1x8": {"mesh": {"data": 1, "fsdp": 8}},
      "h200:1x1": {"model": {"attention": "flash"}},
    },
  })

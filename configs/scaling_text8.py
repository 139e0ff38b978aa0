r"""Scaling laws on text8: three objectives, six sizes, four budgets, two seeds.

For an accelerator; `dllm scaling` says before it starts how long the machine takes.
At 1e17 FLOPs a network of 31M parameters reads the 90M characters six times.

    dllm prepare --input=text8 --tokenizer=char --output=text8_tokens \
        --length=256 --held_out=0.1
    dllm scaling --grid=scaling_text8 --output=runs/scaling_text8
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the defaults."""
  return ConfigDict({
    "data": {"path": "text8_tokens", "length": 256},
    "objective": {"name": "mdlm", "schedule": {"name": "linear"}},
    "model": {
      "width": 512,
      "layers": 8,
      "heads": 8,
      "qk_norm": True,
      "embedding_std": 1.0,
      "dtype": "bfloat16",
    },
    "optimizer": {
      "name": "muon",
      "learning_rate": 0.01,
      "schedule": "cosine",
      "warmup_steps": 500,
      "weight_decay": 0.01,
    },
    "training": {"batch_size": 128, "ema_decay": 0.99},
    "evaluation": {"batch_size": 256, "passes": 2},
    "variants": {
      "autoregressive": {"objective": {"name": "autoregressive"}},
      "bd3lm": {"objective": {"name": "bd3lm", "block_size": 16}},
    },
    "grid": {
      "configs": (
        "scaling_text8:autoregressive",
        "scaling_text8",
        "scaling_text8:bd3lm",
      ),
      "flops": (3e15, 1e16, 3e16, 1e17),
      "sizes": ("128x4", "192x6", "256x8", "384x8", "512x10", "768x12"),
      "seeds": (0, 1),
    },
  })

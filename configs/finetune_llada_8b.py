r"""LLaDA-8B fine-tuned by LoRA on conversations: one server of 8 x H100.

    dllm convert --from_hf=LLaDA-8B-Instruct --workdir=runs/chat --dtype=bfloat16
    dllm train --workdir=runs/chat --config.data.path=chats.jsonl \
        --config.model.adapter.rank=16 --config.model.remat=full ...

An import has the family's shape and rule; this file states the rest of a run, and
is what was planned. 16 rows of 1024 tokens a device fit: 26.4 of 72.7 GiB on each
of 8 x H100 and 26.3 GiB on one, and 16.8 GiB with the frozen matrices in 4 bits
(`--config.model.adapter.base=nf4`), by

    dllm plan --config=finetune_llada_8b --topology=h100:1x8 \
        --config.model.attention=xla

without cuDNN's attention, whose library this was not planned with.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the defaults."""
  return ConfigDict({
    "vocab_size": 126_464,
    "data": {"path": "chats.jsonl", "length": 1024},
    "objective": {"name": "llada"},
    "model": {
      "width": 4096,
      "layers": 32,
      "heads": 32,
      "mlp_dim": 12_288,
      "rope_theta": 500_000.0,
      "norm_eps": 1e-5,
      "dtype": "bfloat16",
      "param_dtype": "bfloat16",
      "remat": "full",
      "adapter": {"name": "lora", "rank": 16, "alpha": 32.0},
    },
    "optimizer": {"learning_rate": 1e-4, "warmup_steps": 50},
    "training": {"steps": 2000, "batch_size": 128},
    "checkpoint": {"every_steps": 200},
    "sampler": {"preset": "llada"},
    "mesh": {"data": 8},
    "machines": {
      "h100:1x1": {
        "mesh": {"data": 1},
        "training": {"batch_size": 16},
      },
      "h100:1x8": {"mesh": {"data": 8}},
    },
  })

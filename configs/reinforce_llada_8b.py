r"""LLaDA-8B taught by rewards, with LoRA: one server of 8 x H100.

    dllm convert --from_hf=LLaDA-8B-Instruct --workdir=runs/chat --dtype=bfloat16
    dllm reinforce --workdir=runs/chat --config=configs/reinforce_llada_8b.py

8 prompts an iteration, 8 rollouts of 256 tokens of each behind prompts of at most
256, sampled and updated 8 rows a device. What that takes is told by

    dllm plan --config=reinforce_llada_8b --program=reinforce \
        --topology=h100:1x8 --config.model.attention=xla
    dllm plan --config=reinforce_llada_8b --program=sample --rows=8 \
        --topology=h100:1x8 --config.model.attention=xla
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "finetune_llada_8b",
    "data": {"path": "problems.jsonl", "length": 512},
    "optimizer": {"learning_rate": 3e-6, "warmup_steps": 0},
    "training": {"steps": 2000, "batch_size": 64},
    "sampler": {
      "preset": "fast_dllm",
      "temperature": 0.9,
      "block_length": 32,
      "cache": "dual",
    },
    "reinforce": {
      "method": "espo",
      "problems": "problems.jsonl",
      "rewards": "number=1",
      "prompts": 8,
      "new_tokens": 256,
    },
    "espo": {"group": 8, "samples": 2},
    "machines": {"h100:1x8": {"mesh": {"data": 8}}},
  })

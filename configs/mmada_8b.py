r"""MMaDA 8B, fine-tuning on pictures: its published shape, for imports and plans.

LLaDA's network with 8192 image tokens behind those of text; pictures of 512
pixels are 1024 of them, texts at most 512 (arXiv:2505.15809, stages 3 and 4:
AdamW at 5e-5, weight decay 0.01, clip 1). An import has the shape by itself:

    dllm convert --from_hf=MMaDA-8B-MixCoT --workdir=runs/mmada \
        --image_tokenizer=magvitv2
    dllm plan --config=mmada_8b --topology=h200:1x8
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the defaults."""
  return ConfigDict({
    "base": "llada_8b",
    "vocab_size": 134_656,
    "data": {
      "path": "pictures",
      "format": "images",
      "length": 1539,
      "image_size": 512,
      "image_tokenizer": "magvitv2",
    },
    "objective": {
      "name": "mmada",
      "t2i": 0.05,
      "lm": 0.6,
      "mmu": 0.4,
      "text_over": "answer",
    },
    "optimizer": {
      "learning_rate": 5e-5,
      "schedule": "cosine",
      "warmup_steps": 5000,
      "b2": 0.999,
      "weight_decay": 0.01,
    },
    "training": {"steps": 50_000, "batch_size": 256},
    "machines": {},
  })

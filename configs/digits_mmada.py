r"""MMaDA on handwritten digits: one small model that draws and names them.

An image tokenizer of 7 x 7 tokens a picture, then a transformer over text and
image tokens (arXiv:2505.15809), both by the same trainer, on a CPU. `DATA` is a
folder with MNIST's `t10k-images-idx3-ubyte.gz` and its labels:

    dllm train --config=digits_mmada:tokenizer --workdir=runs/tokens \
        --config.data.path=DATA
    dllm train --config=digits_mmada --workdir=runs/digits \
        --config.data.path=DATA --config.data.image_tokenizer=runs/tokens
    dllm sample --workdir=runs/digits --prompt='a seven' --image=seven.png
    dllm sample --workdir=runs/digits --input_image=seven.png \
        --prompt='What is this?'
    dllm evaluate --workdir=runs/digits --task=images
"""

from ml_collections import ConfigDict

SIZE, SIDE = 28, 4  # pixels of a picture, of a token
TEXT = 18  # tokens of a text: question and answer, and an end


def get_config() -> ConfigDict:
  """Returns what differs from the defaults."""
  tokens = (SIZE // SIDE) ** 2
  return ConfigDict({
    "data": {
      "path": "digits",
      "format": "images",
      "tokenizer": "bpe:308",  # each name is one token
      "length": tokens + TEXT + 3,
      "image_size": SIZE,
      "image_tokenizer": "runs/tokens",
      "held_out": 0.1,
    },
    "objective": {
      "name": "mmada",
      "time_rule": "stratified",
      "pads": "hard",
      "mmu": 1.0,
      # Names are one token: where it is seldom masked, and weighed by 1 / p, few
      # pictures in a batch decide.
      "schedule": {"name": "polynomial", "power": 0.2},
    },
    "model": {
      "width": 128,
      "layers": 4,
      "heads": 4,
      "embedding_std": 1.0,
      "learned_positions": tokens + TEXT + 3,
      "dropout": 0.2,  # nine thousand pictures are seen six times
      "unroll": 4,
    },
    "optimizer": {
      "learning_rate": 2e-3,
      "warmup_steps": 100,
      "schedule": "cosine",
    },
    "training": {"steps": 3600, "batch_size": 32, "ema_decay": 0.995},
    "evaluation": {"every_steps": 0, "sample_every": 0},
    "checkpoint": {"every_steps": 1200},
    "sampler": {"preset": "llada"},  # of text; pictures have their own
    "variants": {
      "tokenizer": {
        "data": {
          "format": "pixels",
          "tokenizer": None,
          "length": SIZE**2,
        },
        "objective": {"name": "magvit2"},
        "model": {
          "name": "image_tokenizer",
          "bits": 8,
          "stem": 16,
          "encoder_channels": (16, 32, 64),
          "encoder_blocks": (1, 1, 1),
          "decoder_channels": (16, 32, 64),
          "decoder_blocks": (1, 1, 1),
          "groups": 8,
        },
        "optimizer": {
          "learning_rate": 2e-3,
          "warmup_steps": 50,
          "schedule": "cosine",
        },
        "training": {"steps": 400, "batch_size": 32, "ema_decay": 0.99},
        "checkpoint": {"every_steps": 400},
      },
    },
  })

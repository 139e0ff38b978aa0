r"""LLaDA 1B on random tokens, to measure the train step of one accelerator.

Length 4096, bfloat16 with float32 master weights. The last line has `mfu`, by
model FLOPs; which remat policy is best is for the machine to say:

    for remat in none dots dots_no_batch full; do
      dllm benchmark train --config=configs/benchmark_llada_1b.py:h200:1x1 \
          --config.model.remat=$remat
    done

The same at a size for any machine, to try the command:
`--config=configs/benchmark_llada_1b.py:smoke`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the base."""
  return ConfigDict({
    "base": "llada_1b",
    "data": {"path": "random", "tokenizer": "numbers:126464"},
    "training": {"batch_size": 8},
    "machines": {
      "h200:1x1": {
        "mesh": {"data": 1},
        "model": {"attention": "cudnn", "remat": "dots"},
      },
    },
  })

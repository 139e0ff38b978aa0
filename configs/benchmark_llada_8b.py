r"""LLaDA-8B's shapes with random bfloat16 weights, to measure a GPU; no training.

One cached network call beside one reading of all weights, for 1, 8 and 32 rows
(a ratio of 1 is what memory allows a batch of 1):

    dllm benchmark sample --config=configs/benchmark_llada_8b.py:h200:1x1 \
        --against=weights --batch_size=1 --batch_size=8 --batch_size=32

Weights are made on the device, 16 GB of them. The same at a size for any
machine, to try the command: `--config=configs/benchmark_llada_8b.py:smoke`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the defaults."""
  return ConfigDict({
    "data": {"path": "random", "tokenizer": "numbers:126464", "length": 384},
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
    },
    "sampler": {
      "preset": "llada",
      "block_length": 32,
      "steps": 16,
      "cache": "dual",
    },
    # The cache is read where it lies.
    "machines": {"h200:1x1": {"model": {"attention": "flash"}}},
  })

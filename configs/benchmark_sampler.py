r"""A random LLaDA-shaped network for `dllm benchmark sample`; trains nothing.

12 layers, width 512, 32,000 tokens; 128 tokens of prompt and 256 new ones in
blocks of 32, two tokens a network call. On 2 CPU cores, batch 1, a dual cache
gives at least 3 times the tokens per second of no cache:

    dllm benchmark sample --config=configs/benchmark_sampler.py --batch_size=1
    dllm benchmark sample --config=configs/benchmark_sampler.py --batch_size=1 \
        --sampler.cache=dual
    dllm benchmark sample --config=configs/benchmark_sampler.py --ragged
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """Returns what differs from the defaults."""
  return ConfigDict({
    "data": {"path": "random", "tokenizer": "numbers:32000", "length": 384},
    "objective": {"name": "llada"},
    "model": {
      "width": 512,
      "layers": 12,
      "heads": 8,
      "mlp_dim": 1536,
      "unroll": 12,  # on a CPU faster than a loop over layers
    },
    "sampler": {
      "preset": "llada",
      "block_length": 32,
      "steps": 16,
      "cache": "none",
    },
  })

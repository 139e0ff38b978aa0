"""What `dllm benchmark serve` measures; how fast it is, is not tested."""

import jax
import pytest

from dllm_jax.config import config
from dllm_jax.reports import benchmark_serve
from dllm_jax.run.run import Run
from dllm_jax.sampling.presets import SamplerConfig

DUAL = SamplerConfig(preset="llada", block_length=8, steps=4, cache="dual")


@pytest.mark.all
def test_an_engine_is_measured_beside_what_it_is_compared_with(tmp_path):
  resolved = config.resolve({
    "data": {"path": "random", "tokenizer": "numbers:20", "length": 24},
    "objective": {"name": "llada"},
    "model": {"width": 16, "layers": 1, "heads": 2},
    "mesh": {"data": 1},
  })
  run = Run.create(resolved, tmp_path / "run", devices=jax.devices()[:1])
  run.start()
  results = benchmark_serve.serve(run, DUAL, slots=2, rounds=1)
  # Two blocks of eight tokens, four calls each.
  assert results["saturated"]["calls_per_token"] == 0.5
  assert results["saturated"]["ratio"] > 0
  found = results["arrivals"]
  assert 0 < found["first_seconds"] < found["answer_seconds"]
  assert found["answer_seconds"] <= found["seconds"]
  assert 0 < found["alone_seconds"] <= 2 * found["block_seconds"]
  assert results["http"]["tokens_per_second"] > 0
  text = benchmark_serve.table(results)
  assert "saturated, 2 slots" in text and "2 arrivals at random" in text
  assert "streams over HTTP" in text

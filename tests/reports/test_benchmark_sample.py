"""What `dllm benchmark sample` measures; how fast it is, is not tested."""

import functools

import jax
import numpy as np
import pytest

from dllm_jax.config import config
from dllm_jax.core.types import Process
from dllm_jax.data.numbers import Numbers
from dllm_jax.reports import benchmark
from dllm_jax.run.run import Run
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.sampling.program import generate
from dllm_jax.sampling.requests import build, continuation

DUAL = SamplerConfig(preset="llada", block_length=8, steps=4, cache="dual")


@pytest.fixture(scope="module", name="run")
def _run(tmp_path_factory):
  resolved = config.resolve({
    "data": {"path": "random", "tokenizer": "numbers:20", "length": 24},
    "objective": {"name": "llada"},
    "model": {"width": 16, "layers": 1, "heads": 2},
    "mesh": {"data": 1},
  })
  workdir = tmp_path_factory.mktemp("run") / "run"
  run = Run.create(resolved, workdir, devices=jax.devices()[:1])
  run.start()
  return run


@pytest.mark.all
def test_ragged_rows_are_the_program_and_the_calls_of_equal_ones(run):
  result = benchmark.sample(
    run, DUAL, batch_size=4, rounds=1, ragged=True, against="equal"
  )
  assert result["programs"] == 1  # The same one for both: no shape differs.
  assert result["function_evaluations"] == 2 * 4  # two blocks, four steps
  assert result["new_tokens"] == 4 * 16
  assert result["ratio"] > 0 and result["against_tokens_per_second"] > 0


@pytest.mark.all
def test_a_cached_call_is_timed_beside_the_weights(run):
  result = benchmark.sample(
    run, DUAL, batch_size=1, rounds=1, against="weights"
  )
  params = jax.tree.leaves(run.state.params["model"])
  assert result["weight_bytes"] == sum(x.nbytes for x in params)
  assert result["weight_read_milliseconds"] > 0
  assert run.state.opt_state is None and run.state.ema_params is None


@pytest.mark.all
def test_what_cannot_be_compared_is_refused(run):
  bare = SamplerConfig(preset="llada", block_length=8)
  with pytest.raises(ValueError, match="measures a cache"):
    benchmark.sample(run, bare, against="uncached")
  with pytest.raises(ValueError, match="--ragged"):
    benchmark.sample(run, DUAL, against="equal")
  with pytest.raises(ValueError, match="legal: uncached, equal, weights"):
    benchmark.sample(run, DUAL, against="yesterday")


@pytest.mark.all
def test_the_published_size_lowers(tmp_path):
  """LLaDA-8B's shapes: 16 GB of weights; calls on a block and on the canvas."""
  resolved = config.load("benchmark_llada_8b")
  tokenizer = Numbers(vocab_size=126_464, mask_id=126_463)
  run = Run(tmp_path, resolved, tokenizer, devices=jax.devices()[:1])
  model = run.served.abstract.params["model"]
  sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(model)]
  assert 15.9e9 < sum(sizes) < 16.1e9
  spec = run.config.sampler.build(run.objective, length=384)
  requests = build(
    [continuation([1] * 128, length=384)], objective=run.objective, length=384
  )
  widths = set()

  def apply(params, inputs, cache):
    if cache is not None:
      widths.add(inputs.latent.shape[1])
    return run.denoiser.apply(params, inputs, cache)

  denoiser = run.denoiser._replace(apply=apply)
  out = jax.eval_shape(
    functools.partial(generate, spec, denoiser),
    model,
    Process(),
    jax.random.key(0),
    jax.tree.map(np.asarray, requests),
  )
  assert out.tokens.shape == (1, 384)
  assert widths == {32, 384}

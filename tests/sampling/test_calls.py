"""What a network call computes, and when none is made."""

import functools
import re

import jax
import numpy as np
import pytest

from dllm_jax.core import vocabulary
from dllm_jax.core.flops import matmul_flops
from dllm_jax.core.types import ModelInputs, ModelOutputs, Process
from dllm_jax.models import transformer, TransformerConfig
from dllm_jax.objectives.autoregressive import Autoregressive
from dllm_jax.parallel import compilation
from dllm_jax.planning.hlo_text import ARRAY, computations
from dllm_jax.sampling.launch import Launcher
from dllm_jax.sampling.policies.ancestral import Ancestral
from dllm_jax.sampling.policies.speculation import Speculation
from dllm_jax.sampling.program import generate, Sampler
from dllm_jax.sampling.requests import build, continuation
from tests.quick import long
from tests.sampling.small import (
  BLOCKS,
  dual,
  KEY,
  LENGTH,
  MDLM_,
  network,
  ragged,
  rows,
  sample,
)


class Restless(Ancestral):
  """Ancestral sampling that never leaves the network alone."""

  idles = False


@pytest.mark.all
@pytest.mark.parametrize("block", [8, None])
def test_an_unchanged_canvas_needs_no_network_call(block):
  requests = ragged(MDLM_)
  spec = lambda policy: Sampler(
    policy=policy(objective=MDLM_, steps=60), length=LENGTH, block_length=block
  )
  kept, plain = (
    sample(spec(policy), requests) for policy in (Ancestral, Restless)
  )
  np.testing.assert_array_equal(kept.tokens, plain.tokens)
  free = np.asarray(requests.valid & ~requests.fixed).sum(axis=1)
  # At most one call for each slot, and one at each block's entry.
  blocks = 1 if block is None else LENGTH // block
  assert (kept.function_evaluations <= free + blocks).all()
  assert (plain.function_evaluations > 2 * kept.function_evaluations).all()
  alone = sample(spec(Ancestral), rows(requests, [2]))
  np.testing.assert_array_equal(alone.tokens[0], kept.tokens[2])
  assert alone.function_evaluations[0] == kept.function_evaluations[2]


@pytest.mark.all
@pytest.mark.parametrize(("reach", "cache"), [long(12, "prefix"), (4, "dual")])
def test_a_prefix_cache_may_reach_as_far_as_the_text(reach, cache):
  """Calls that are as wide as what follows a prompt give the same tokens.

  Those that are as wide as a block are those of the other cache.
  """
  made = [continuation([i] * 12, length=LENGTH) for i in (3, 4)]
  requests = build(made, objective=MDLM_, length=LENGTH)
  whole = sample(dual(MDLM_, cache=cache), requests)
  part = sample(dual(MDLM_, cache="prefix", reach=reach), requests)
  np.testing.assert_array_equal(part.tokens, whole.tokens)


@pytest.mark.all
def test_two_shapes_of_the_network_and_what_they_cost():
  """A call on W of T slots takes W / T of the FLOPs of one on the canvas."""
  requests = ragged(BLOCKS)
  for spec, width in (
    (dual(MDLM_, cache="prefix"), 24),
    (dual(MDLM_, cache="prefix", reach=12), 12),
    (dual(MDLM_, cache="dual"), 4),
    (dual(BLOCKS, cache="block", blocks_from="start"), 4),
  ):
    flops = costs(spec, requests)
    assert set(flops) == {width, LENGTH}
    assert flops[width] * LENGTH == flops[LENGTH] * width


def costs(spec, requests):
  """Returns the FLOPs of network calls in a program, by their positions."""
  denoiser, params = network()
  seen = {}

  def apply(params, inputs, cache):
    if cache is not None:
      made = matmul_flops(denoiser.apply, params, inputs, cache)
      seen[inputs.latent.shape[1]] = made
    return denoiser.apply(params, inputs, cache)

  spied = denoiser._replace(apply=apply)
  args = params, Process(), KEY, requests
  jax.eval_shape(functools.partial(generate, spec, spied), *args)
  return seen


@pytest.mark.all
def test_layers_that_are_unrolled_are_read_where_they_lie():
  """CPUs would copy a layer's matrices out of the stack at every call."""
  requests = ragged(MDLM_)
  spec, found = dual(MDLM_, cache="dual"), []
  for unroll in (1, 2):
    denoiser, params = network(unroll=unroll)
    fn = jax.jit(functools.partial(generate, spec, denoiser))
    compiled = fn.lower(params, Process(), KEY, requests).compile()
    tokens = compiled(params, Process(), KEY, requests).tokens
    found.append((tokens, matrices_in_loops(compiled.as_text(), (32, 128))))
  (looped, copied), (unrolled, kept) = found
  np.testing.assert_array_equal(looped, unrolled)
  # Three matrices of the perceptron, in refreshing passes and in cached calls.
  assert copied == 2 * 3 and kept == 0


@pytest.mark.parametrize("unroll", [1, 2])
@pytest.mark.parametrize("fields", [{}, {"experts": 3, "experts_per_token": 2}])
def test_what_has_half_the_bits_is_widened_a_layer_at_a_time_at_most(
  fields, unroll
):
  """CPUs would make float32 copies of all stacks before the first step.

  And of the cache for each write. Layers that are unrolled are not widened.
  """
  denoiser, params = network(dtype="bfloat16", unroll=unroll, **fields)
  params = jax.tree.map(lambda x: x.astype("bfloat16"), params)
  requests = ragged(MDLM_)
  launcher = Launcher(dual(MDLM_, cache="dual"), denoiser)
  lowered = launcher.lower(params, Process(), KEY, requests)
  program, entry = computations(lowered.compile().as_text())
  caches = jax.eval_shape(lambda: denoiser.cache(len(requests.tokens), LENGTH))
  stacks = [x for x in jax.tree.leaves(params["layers"]) if x.size > 1000]
  text = lambda shapes: {",".join(map(str, shape)) for shape in shapes}
  unembedding = params["unembed"]["kernel"].shape
  layers, batch, heads, _, width = caches.key.shape  # some room, besides
  cached = re.compile(rf"{layers},{batch},{heads},\d+,{width}")
  everywhere = set()
  before = text([unembedding, *(x.shape for x in stacks)])
  if unroll == 2:
    everywhere |= before | text(x.shape[1:] for x in stacks)
  for name, made in program.items():
    if "fused" in name:  # no array of its own
      continue
    for op in made.values():
      found = ARRAY.match(op.shape)
      if found and found[1] == "f32":
        assert found[2] not in everywhere, (name, op)
        assert not cached.fullmatch(found[2]), (name, op)
        assert name != entry or found[2] not in before, op


@pytest.mark.all
@pytest.mark.parametrize("source", ["masks", "quadratic"])
def test_drafts_and_their_tests_widen_no_unembedding(source):
  objective = Autoregressive(vocab_size=100, mask_id=99, bos_id=0)
  network = transformer(
    TransformerConfig(
      vocab_size=100, width=32, heads=2, layers=1, mlp_dim=64, dtype="bfloat16"
    )
  )
  ones = np.ones((1, 1), np.int32)
  inputs = ModelInputs(latent=ones, positions=ones, segment_ids=ones)
  half = lambda x: x.astype("bfloat16")
  params = jax.tree.map(half, network.init(KEY, inputs))
  spec = Sampler(
    policy=Speculation(objective=objective, source=source, drafts=2),
    length=8,
    block_length=1,
    cache="block",
  )
  requests = build([[1] + [None] * 7], objective=objective, length=8)
  lowered = Launcher(spec, network).lower(params, Process(), KEY, requests)
  text = lowered.compile().as_text()
  assert " while(" in text and matrices_in_loops(text, (32, 128)) == 0


def test_an_unembedding_of_half_the_bits_is_widened_for_no_chunk(
  monkeypatch,
):
  monkeypatch.setattr(vocabulary, "_chunk_rows", lambda vocab: 4)
  half = lambda *shape: jax.numpy.ones(shape, "bfloat16")
  out = ModelOutputs(hidden=half(2, 16, 32), unembed=half(32, 128))
  program = compilation.jit(
    lambda out: vocabulary.reduce(lambda logits: logits.max(axis=-1), out),
    dtype="bfloat16",
    options=compilation.call_options(),
  )
  text = program.lower(out).compile().as_text()
  assert " while(" in text and matrices_in_loops(text, (32, 128)) == 0


def matrices_in_loops(text, shape):
  """Returns how many arrays of a shape, either way, loops make."""
  program, _ = computations(text)
  made = [
    op
    for name in re.findall(r"body=%?([\w.\-~]+)", text)
    for op in program[name].values()
    if op.code not in ("get-tuple-element", "bitcast")
  ]
  legal = {",".join(map(str, s)) for s in (shape, shape[::-1])}
  dims = [ARRAY.match(op.shape) for op in made]
  return sum(found is not None and found[2] in legal for found in dims)

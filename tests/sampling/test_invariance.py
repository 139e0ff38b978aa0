"""What a row's tokens do not depend on: caches, neighbours, padding, meshes."""

import dataclasses

import jax
import numpy as np
import pytest

from dllm_jax.core.types import Process
from dllm_jax.parallel import global_batch, make_mesh, RULES, shardings
from dllm_jax.sampling.launch import Launcher
from dllm_jax.sampling.policies.ancestral import Ancestral
from dllm_jax.sampling.policies.guidance import Guidance
from dllm_jax.sampling.policies.remasking import Cap, ReMDM, Rescale
from dllm_jax.sampling.policies.selection import Even, Factor, Threshold
from dllm_jax.sampling.policies.unmasking import FirstHitting
from dllm_jax.sampling.program import Sampler
from dllm_jax.sampling.requests import build, continuation
from tests.quick import long
from tests.sampling import published, ties
from tests.sampling.small import (
  AUTOREGRESSIVE,
  BLOCKS,
  confidence,
  DREAM,
  dual,
  KEY,
  LENGTH,
  MASK,
  MDLM_,
  network,
  program,
  ragged,
  rows,
  sample,
  TIMED,
)

EXACT = {
  "threshold": (
    BLOCKS,
    confidence(BLOCKS, 4, selection=Threshold(value=0.5)),
    4,
  ),
  "first_hitting": (BLOCKS, FirstHitting(objective=BLOCKS, steps=4), 4),
  "timed": (TIMED, Ancestral(objective=TIMED, steps=3), 4),
  "remdm": (BLOCKS, ReMDM(objective=BLOCKS, steps=3), 4),
  "autoregressive": (
    AUTOREGRESSIVE,
    Ancestral(objective=AUTOREGRESSIVE, steps=1),
    1,
  ),
}


def exact(name, cache, **fields):
  objective, policy, block = EXACT[name]
  start = "prompt" if name == "autoregressive" else "start"
  return Sampler(
    policy=policy,
    length=LENGTH,
    block_length=block,
    blocks_from=start,
    cache=cache,
    **fields,
  )


@pytest.mark.parametrize(
  "name",
  [
    "autoregressive",
    *map(long, ("threshold", "timed", "first_hitting", "remdm")),
  ],
)
@pytest.mark.all
def test_an_exact_cache_changes_nothing(name):
  net = network(conditioned=name == "timed")
  requests = ragged(EXACT[name][0])
  plain = sample(exact(name, "none"), requests, net)
  cached = sample(exact(name, "block"), requests, net)
  np.testing.assert_array_equal(cached.tokens, plain.tokens)
  assert not (np.asarray(plain.tokens) == MASK).any()
  more = np.asarray(cached.function_evaluations - plain.function_evaluations)
  # The pass over the prompt, and one for each block that is kept.
  if name == "autoregressive":
    # There the next call keeps a token, but before one that was given.
    prompt = np.cumprod(requests.fixed, axis=1).sum(axis=1)
    last = np.argmax(np.cumsum(requests.valid & ~requests.fixed, 1), axis=1)
    between = [requests.fixed[i, prompt[i] : last[i]].sum() for i in range(4)]
    assert max(between) > 0
    np.testing.assert_array_equal(more, (prompt > 1) + np.array(between))
  else:
    assert (more >= 1).all()


@pytest.mark.parametrize(
  "name", ["autoregressive", *map(long, ("threshold", "timed", "opens"))]
)
@pytest.mark.all
def test_what_lies_before_given_tokens_is_kept_if_no_neighbour_calls(name):
  """A whole block is given inside a text, and one behind all that is wanted."""
  if name == "opens":
    opening = dataclasses.replace(BLOCKS, shift=1, opens=True)
    policy = confidence(opening, 4, selection=Threshold(value=0.5))
    spec = dataclasses.replace(exact("threshold", "block"), policy=policy)
  else:
    spec = exact(name, "block")
  given, wanted = [7, 5, 3, 8], [None] * 4
  inside = [0, 4, *wanted, None, None, *given, *wanted, *given]
  made = [inside, [0, 4] + 22 * [None], *2 * [[0, 9, 4, *wanted]]]
  requests = build(made, objective=spec.objective, length=LENGTH)
  net = network(conditioned=name == "timed")
  batched = sample(spec, requests, net)
  alone = sample(spec, rows(requests, [0] * 4), net)
  np.testing.assert_array_equal(alone.tokens[0], batched.tokens[0])
  assert alone.function_evaluations[0] == batched.function_evaluations[0]
  if name != "opens":  # has no other cache
    plain = sample(exact(name, "none"), requests, net)
    np.testing.assert_array_equal(alone.tokens[0], plain.tokens[0])


ALONE = {
  "dual": dual(MDLM_, cache="dual"),
  "prefix": dual(MDLM_, cache="prefix", refresh=2),
  "shifted": dual(DREAM, cache="dual"),
  "guided": dual(MDLM_, cache="dual", guidance=Guidance(scale=0.8)),
  "block": exact("threshold", "block"),
  "remdm": Sampler(policy=ReMDM(objective=MDLM_, steps=5), length=LENGTH),
}


@pytest.mark.parametrize(
  "name",
  ["dual", *map(long, ("block", "guided", "prefix", "shifted", "remdm"))],
)
def test_alone_equals_batched_equals_reordered(name):
  spec = ALONE[name]
  requests = ragged(spec.objective)
  batched = sample(spec, requests)
  order = [2, 0, 3, 1]
  shuffled = sample(spec, rows(requests, order))
  np.testing.assert_array_equal(shuffled.tokens, batched.tokens[order])
  for row in (0, 3):
    alone = sample(spec, rows(requests, [row]))
    np.testing.assert_array_equal(alone.tokens[0], batched.tokens[row])
    assert alone.function_evaluations[0] == batched.function_evaluations[row]


@pytest.mark.parametrize("dtype", [long("float32"), long("bfloat16")])
def test_more_padding_changes_a_token_only_on_a_tie(dtype):
  net = network(dtype=dtype)
  spec = Sampler(policy=confidence(MDLM_, 6), length=LENGTH)
  wide = dataclasses.replace(spec, length=32)
  requests, longer = (ragged(MDLM_, n, rows=16) for n in (LENGTH, 32))
  short, padded = sample(spec, requests, net), sample(wide, longer, net)
  differ = np.asarray(short.tokens != padded.tokens[:, :LENGTH])
  free = np.asarray(requests.valid & ~requests.fixed)
  print(f"{dtype}: {differ[free].mean():.2%} of the tokens differ by padding")
  if dtype == "bfloat16":  # Only a rate is promised, but for equal lengths.
    alone = sample(spec, rows(requests, [5]), net)
    np.testing.assert_array_equal(alone.tokens[0], short.tokens[5])
    return
  close = []
  if differ.any():
    traces = (
      sample(spec, requests, net, trace=True),
      sample(wide, longer, net, trace=True),
    )
    close = ties.margins(spec, net, requests, *traces)
  print(f"{len(close)} of 16 rows differ, on margins under 1e-4")
  assert max(close, default=0.0) < 1e-4


@pytest.mark.parametrize(
  ("name", "sizes"),
  [
    long("dual", {"data": 2, "fsdp": 2, "tensor": 2}),
    long("block", {"fsdp": 4, "tensor": 2}),
    long("none", {"fsdp": 4, "tensor": 2}),
  ],
)
def test_meshes_change_a_token_only_on_a_tie(name, sizes):
  whole = Sampler(policy=confidence(MDLM_, 6), length=LENGTH)
  spec = ALONE.get(name, whole)
  requests = ragged(spec.objective)
  denoiser, params = net = network()
  mesh = make_mesh(sizes)

  def spread(trace):
    with jax.set_mesh(mesh):
      placed = jax.device_put(params, shardings(params, mesh, RULES))
      args = placed, Process(), KEY, global_batch(requests, mesh)
      return published.quick(spec, denoiser, *args, trace=trace)

  plain, divided = sample(spec, requests), spread(False)
  if name != "none":  # None of these rows has a tie.
    np.testing.assert_array_equal(divided.tokens, plain.tokens)
  elif (divided.tokens != plain.tokens).any():
    plain = sample(spec, requests, trace=True)
    close = ties.margins(spec, net, requests, plain, spread(True))
    print(f"{len(close)} of 4 rows differ, on margins under 1e-4")
    assert max(close) < 1e-4


@pytest.mark.all
@pytest.mark.parametrize("cache", ["none", "dual", "prefix", "block"])
def test_guidance_of_scale_0_is_none_and_of_another_scale_is_not(cache):
  exactly = cache == "block"
  requests = ragged(BLOCKS if exactly else MDLM_)
  spec = lambda guidance: (
    exact("threshold", "block", guidance=guidance)
    if exactly
    else dual(MDLM_, cache=cache, guidance=guidance)
  )
  plain = sample(spec(None), requests)
  zero = program(spec(Guidance(scale=0.0)), requests)
  assert zero == program(spec(None), requests)  # Not a branch is left of it.
  tiny = sample(spec(Guidance(scale=1e-7)), requests)
  np.testing.assert_array_equal(tiny.tokens, plain.tokens)
  strong = sample(spec(Guidance(scale=4.0)), requests)
  assert (strong.tokens != plain.tokens).any()


@pytest.mark.all
def test_class_guidance_of_the_null_class_is_none():
  net = network(classes=3)
  requests = dataclasses.replace(ragged(MDLM_), cond=np.full(4, 3, np.int32))
  guided = Guidance(scale=2.0, kind="class", null_label=3)
  plain = sample(dual(MDLM_), requests, net)
  same = sample(dual(MDLM_, guidance=guided), requests, net)
  np.testing.assert_array_equal(same.tokens, plain.tokens)
  labelled = dataclasses.replace(requests, cond=np.arange(4, dtype=np.int32))
  other = sample(dual(MDLM_, guidance=guided), labelled, net)
  assert (other.tokens[:3] != plain.tokens[:3]).any()


@pytest.mark.all
@pytest.mark.parametrize("rule", [Cap(eta=0.0), Rescale(eta=0.0)])
def test_remdm_without_remasking_is_mdlm(rule):
  requests = ragged(MDLM_)
  plain = Sampler(policy=Ancestral(objective=MDLM_, steps=6), length=LENGTH)
  remasking = ReMDM(objective=MDLM_, steps=6, rule=rule)
  spec = Sampler(policy=remasking, length=LENGTH)
  np.testing.assert_array_equal(
    sample(spec, requests).tokens, sample(plain, requests).tokens
  )


@pytest.mark.parametrize(
  ("low", "high"),
  [
    (Threshold(value=1.0), Threshold(value=1e-6)),
    long(Factor(value=1e-6), Factor(value=1e6)),
  ],
)
@pytest.mark.all
def test_limits_are_one_a_step_and_all_at_once(low, high):
  requests = ragged(MDLM_)
  free = np.asarray(requests.valid & ~requests.fixed).sum(axis=1)
  spec = lambda selection, steps: Sampler(
    policy=confidence(MDLM_, steps, selection=selection), length=LENGTH
  )
  one = sample(spec(low, LENGTH), requests)
  np.testing.assert_array_equal(one.function_evaluations, free)
  single = lambda: Even(steps=None)
  plan = sample(spec(single(), LENGTH), requests)
  np.testing.assert_array_equal(one.tokens, plan.tokens)
  everything = sample(spec(high, LENGTH), requests)
  assert (np.asarray(everything.function_evaluations) == 1).all()


@pytest.mark.all
def test_a_row_stops_at_its_end_of_text_and_others_go_on():
  requests = ragged(BLOCKS, seed=1, rows=8)
  plain = sample(exact("threshold", "block"), requests)
  tokens = np.asarray(plain.tokens)
  free = np.asarray(requests.valid & ~requests.fixed)
  first = np.argmax(free, axis=1)
  end = int(tokens[0, first[0] + 1])  # Drawn in row 0's first blocks.
  stopped = sample(exact("threshold", "block", end_ids=(end,)), requests)
  found = np.asarray(stopped.tokens)
  for row in range(8):
    hits = np.flatnonzero(free[row] & (tokens[row] == end))
    if not len(hits):
      np.testing.assert_array_equal(found[row], tokens[row])
      continue
    after = free[row] & (np.arange(LENGTH) > hits[0])
    assert (found[row][after] == end).all()
    np.testing.assert_array_equal(found[row][~after], tokens[row][~after])
    calls = stopped.function_evaluations[row]
    assert calls <= plain.function_evaluations[row]
  assert stopped.function_evaluations[0] < plain.function_evaluations[0]


@pytest.mark.all
@pytest.mark.parametrize("cache", ["dual", long("none"), long("prefix")])
def test_a_growing_text_does_not_see_what_follows(cache):
  spec = dual(MDLM_, cache=cache, extend=True)
  rows = [continuation([3, 4, 5], length=LENGTH, new_tokens=n) for n in (8, 20)]
  requests = build(rows, objective=MDLM_, length=LENGTH, request=[7, 7])
  tokens = np.asarray(sample(spec, requests).tokens)
  np.testing.assert_array_equal(tokens[0, :11], tokens[1, :11])


@pytest.mark.all
@pytest.mark.parametrize("cache", ["dual", long("none")])
def test_a_sliding_window_forgets_what_is_left_of_it(cache):
  spec = dual(MDLM_, cache=cache, extend=True, context=8)
  prompts = [[1] * 8 + [5, 6, 7, 8], [2] * 8 + [5, 6, 7, 8]]
  rows = [continuation(p, length=LENGTH) for p in prompts]
  requests = build(rows, objective=MDLM_, length=LENGTH, request=[7, 7])
  tokens = np.asarray(sample(spec, requests).tokens)
  np.testing.assert_array_equal(tokens[0, 12:], tokens[1, 12:])
  seen = dataclasses.replace(spec, context=None)
  tokens = np.asarray(sample(seen, requests).tokens)
  assert (tokens[0, 12:] != tokens[1, 12:]).any()


@pytest.mark.parametrize("name", [long("dual"), long("block"), long("guided")])
def test_one_dispatch_for_several_blocks(name):
  spec = ALONE[name]
  denoiser, params = network()
  launcher = Launcher(spec, denoiser)
  args = jax.device_put((params, Process(), KEY, ragged(spec.objective)))
  launcher.compile(*args)
  with jax.transfer_guard("disallow"):
    launcher(*args).tokens.block_until_ready()
    launcher(*args).tokens.block_until_ready()
  assert launcher.programs() == 1

"""The sampling program: its law, its equality with a plain loop, invariance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.noise import Keyed
from dllm_jax.core.types import Batch, Process
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.sampling.launch import Launcher
from dllm_jax.sampling.policies.ancestral import Ancestral
from dllm_jax.sampling.policies.processors import Temperature, TopK, TopP
from dllm_jax.sampling.policies.unmasking import Unmasking
from dllm_jax.sampling.program import generate, Sampler
from dllm_jax.sampling.requests import build, continuation, Requests
from tests import jaxprs, toys
from tests.quick import long
from tests.sampling import published

VOCAB, MASK = 12, 11
OBJECTIVE = MDLM(vocab_size=VOCAB, mask_id=MASK)
KEY = jax.random.key(7)


class Shifted(MDLM):
  """MDLM for a network whose output at slot i predicts slot i + 1."""

  shift = 1


class Carrying(MDLM):
  """MDLM whose latent carries vectors beside its tokens."""

  def inputs(self, process, z, t, batch):
    return super().inputs(process, z["tokens"], t, batch)

  def prior(self, noise, shape):
    return self.clean(None, super().prior(noise, shape))

  def clean(self, process, tokens):
    return {"tokens": tokens, "calls": jnp.zeros((*tokens.shape, 2))}

  def decode(self, process, z):
    del process
    return z["tokens"] + 0 * z["calls"][..., 0].astype(jnp.int32)

  def reverse(self, process, noise, out, z, t, s, *, reading=None, window=None):
    tokens, noted = super().reverse(
      process, noise, out, z["tokens"], t, s, reading=reading, window=window
    )
    return {"tokens": tokens, "calls": z["calls"] + 1}, noted


class Rewriting(MDLM):
  """A process that draws every slot anew at each step."""

  def reverse(self, process, noise, out, z, t, s, *, reading=None, window=None):
    return super().reverse(
      process,
      noise,
      out,
      jnp.full_like(z, MASK),
      t,
      0.0 * s,
      reading=reading,
      window=window,
    )


def sampler(
  policy=Ancestral,
  *,
  length,
  objective=OBJECTIVE,
  steps=5,
  block=None,
  **kwargs,
):
  return Sampler(
    policy=policy(objective=objective, steps=steps, **kwargs),
    length=length,
    block_length=block,
  )


@functools.cache
def network():
  denoiser = toys.mixer(VOCAB, 8, padded=16)
  init = lambda: denoiser.init(jax.random.key(0), None)
  return denoiser, jax.jit(init)()


def requests_of(rows, length, **kwargs):
  return build(rows, objective=OBJECTIVE, length=length, **kwargs)


def run(spec, requests, *, trace=False, net=None):
  denoiser, params = net or network()
  args = params, Process(), KEY, requests
  return published.quick(spec, denoiser, *args, trace=trace)


def ragged(length=14):
  """Prompts of several lengths, an infill, and rows that end early."""
  return requests_of(
    [
      continuation([1, 2, 3], length=length),
      continuation([], length=length, new_tokens=9),
      [4, 4, None, None, None, 5, 6, None, None, 7],
      continuation([8] * 7, length=length),
    ],
    length,
    request=[5, 0, 9, 3],
  )


@pytest.mark.all  # a hundred steps of tens of thousands of rows
def test_ancestral_law_is_the_joint_law():
  sequences, p = toys.joint(3, tokens=3, length=4)
  objective = MDLM(vocab_size=4, mask_id=3)
  rows, steps = 60_000, 100
  requests = Requests(
    tokens=np.zeros((rows, 4), np.int32),
    fixed=np.zeros((rows, 4), bool),
    valid=np.ones((rows, 4), bool),
    request=np.arange(rows, dtype=np.int32),
  )
  spec = sampler(length=4, objective=objective, steps=steps)
  net = toys.tabular(3, 4, mask_id=3), jnp.array(p, jnp.float32)
  tokens = np.asarray(run(spec, requests, net=net).tokens)
  index = tokens @ np.array([27, 9, 3, 1])
  frequency = np.bincount(index, minlength=len(p)) / rows
  # A perfect sampler would be off by about 0.4 sqrt(81 / rows) = 0.012 at most.
  assert np.abs(frequency - p).sum() / 2 < 0.02
  assert (sequences[index] == tokens).all()


@pytest.mark.parametrize(
  ("policy", "block", "shift"),
  [
    long(Ancestral, 4, 1),
    (Unmasking, None, 1),
    long(Ancestral, None, 0),
    long(Unmasking, 4, 0),
  ],
)
@pytest.mark.all
def test_scan_equals_a_plain_loop(policy, block, shift):
  objective = (Shifted if shift else MDLM)(vocab_size=VOCAB, mask_id=MASK)
  spec = sampler(
    policy,
    length=14,
    objective=objective,
    steps=3,
    block=block,
    processors=(Temperature(0.7), TopK(5)),
  )
  requests, net = ragged(), network()
  got = run(spec, requests, net=net)
  # Rows 2 and 3: fixed slots inside a block, and a last block cut short.
  want = [_plain_loop(spec, requests, net, row) for row in (2, 3)]
  np.testing.assert_array_equal(got.tokens[2:], want)


def _plain_loop(spec, requests, net, row):
  """Samples one row with Python loops over blocks, steps and slots."""
  denoiser, params = net
  objective, policy = spec.objective, spec.policy
  pick = lambda x: jnp.asarray(x[row : row + 1])
  fixed, valid, given = map(
    pick, (requests.fixed, requests.valid, requests.tokens)
  )
  length, free = spec.length, valid & ~fixed
  positions = jnp.arange(length)[None]
  batch = Batch(
    tokens=given,
    loss_mask=free,
    segment_ids=valid.astype(jnp.int32),
    positions=positions,
  )

  @jax.jit
  def call(z, state, active, index, count):
    inputs = objective.inputs(Process(), z, policy.time(state), batch)
    out, _ = denoiser.apply(params, inputs, None)
    noise = Keyed.at(
      KEY,
      request=pick(requests.request),
      step=count[None],
      position=index[None],
    )
    new, state, _ = policy.step(
      Process(),
      noise,
      out,
      z[:, index],
      state,
      active,
      window=index[None] - objective.shift,
    )
    return new, state

  first, width = 0, length
  if spec.block_length is not None:
    width = spec.block_length
    while first < length and fixed[0, first]:
      first += 1
  z, count = np.where(free, MASK, given), 0
  while first < length:
    slots = np.arange(first, min(first + width, length))
    first += width
    active = np.asarray(free)[:, slots]
    if not active.any():
      continue
    state = policy.init(Process(), z[:, slots], jnp.asarray(active))
    for _ in range(spec.steps):
      if not (z[:, slots] == MASK)[np.asarray(active)].any():
        break
      new, state = call(z, state, active, slots, jnp.int32(count))
      for j, slot in enumerate(slots):
        if active[0, j]:
          z[0, slot] = new[0, j]
      count += 1
  return np.where(free, z, given)[0]


@pytest.mark.parametrize("policy", [Ancestral, Unmasking])
@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.few(1)
def test_fixed_slots_stay_and_all_others_are_text(policy, block):
  requests = ragged()
  out = run(sampler(policy, length=14, block=block), requests)
  tokens = np.asarray(out.tokens)
  keep = requests.fixed | ~requests.valid
  np.testing.assert_array_equal(tokens[keep], requests.tokens[keep])
  free = tokens[requests.valid & ~requests.fixed]
  assert ((free >= 0) & (free != MASK) & (free < VOCAB)).all()


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.few(1)
def test_fixed_slots_stay_even_if_a_process_rewrites_every_slot(block):
  requests = ragged()
  objective = Rewriting(vocab_size=VOCAB, mask_id=MASK)
  spec = sampler(length=14, objective=objective, block=block)
  frames = run(spec, requests, trace=True).trace.frames
  keep = requests.fixed | ~requests.valid
  for tokens in np.asarray(frames.tokens):  # As the network sees them.
    np.testing.assert_array_equal(tokens[keep], requests.tokens[keep])


def test_what_lies_in_unused_slots_is_not_seen():
  requests = ragged()
  other = requests.replace(tokens=np.where(requests.valid, requests.tokens, 3))
  spec = sampler(length=14, processors=(Temperature(0.1),))
  got, want = run(spec, other).tokens, run(spec, requests).tokens
  np.testing.assert_array_equal(
    np.asarray(got)[requests.valid], np.asarray(want)[requests.valid]
  )


def test_blocks_start_at_each_prompt_and_go_left_to_right():
  requests = ragged()
  out = run(
    sampler(Unmasking, length=14, steps=2, block=4), requests, trace=True
  )
  revealed = np.asarray(out.trace.frames.committed)
  step, row, slot = np.nonzero(revealed)
  start = np.array([3, 0, 2, 7])
  # Two steps a block: a slot is revealed in the block that covers it.
  np.testing.assert_array_equal(step // 2, (slot - start[row]) // 4)
  np.testing.assert_array_equal(
    revealed.sum(0), requests.valid & ~requests.fixed
  )
  # Two calls a block; one for a block with one slot.
  np.testing.assert_array_equal(out.function_evaluations, [6, 5, 4, 4])


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.few(1)
def test_a_latent_may_be_a_pytree(block):
  requests = ragged()
  carrying = Carrying(vocab_size=VOCAB, mask_id=MASK)
  got = run(sampler(length=14, objective=carrying, block=block), requests)
  want = run(sampler(length=14, block=block), requests)
  np.testing.assert_array_equal(got.tokens, want.tokens)


@pytest.mark.all
def test_rows_over_eight_devices_equal_one():
  requests = requests_of([continuation([i], length=9) for i in range(8)], 9)
  spec = sampler(Unmasking, length=9, steps=3, block=3)
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  rows = jax.NamedSharding(mesh, jax.P("data"))
  with jax.set_mesh(mesh):
    spread = run(spec, jax.device_put(requests, rows))
  np.testing.assert_array_equal(spread.tokens, run(spec, requests).tokens)


def test_a_trace_changes_nothing_and_agrees():
  requests = ragged()
  spec = sampler(Unmasking, length=14, block=4)
  plain, traced = run(spec, requests), run(spec, requests, trace=True)
  np.testing.assert_array_equal(plain.tokens, traced.tokens)
  np.testing.assert_array_equal(
    plain.function_evaluations, traced.function_evaluations
  )
  assert plain.trace is None
  frames = traced.trace.frames
  np.testing.assert_array_equal(frames.tokens[-1], traced.tokens)
  confidence = np.asarray(frames.confidence)
  assert (confidence >= 0).all() and (confidence <= 1).all()
  assert (confidence[np.asarray(frames.committed)] > 0).all()
  assert (np.asarray(frames.entropy) <= np.log(VOCAB - 1) + 1e-5).all()
  assert not frames.remasked.any()


def test_compiles_once_and_moves_nothing_to_the_host():
  denoiser, params = network()
  launcher = Launcher(sampler(length=14, block=4), denoiser)
  args = jax.device_put((params, Process(), KEY, ragged()))
  first = launcher.compile(*args)
  assert first > 0 and launcher.compile(*args) == 0.0
  with jax.transfer_guard("disallow"):
    launcher(*args)
    launcher(*args).tokens.block_until_ready()
  assert launcher.programs() == 1
  assert launcher.compile_seconds == first


@pytest.mark.parametrize("policy", [Ancestral, Unmasking])
@pytest.mark.parametrize("trace", [False, True])
def test_no_value_has_canvas_times_vocabulary(policy, trace):
  rows, length, vocab = 2, 1024, 50_000
  objective = MDLM(vocab_size=vocab, mask_id=vocab - 1)
  spec = sampler(
    policy,
    length=length,
    objective=objective,
    steps=3,
    block=None,
    processors=(TopK(50), Temperature(0.5), TopP(0.9)),
  )
  denoiser = toys.mixer(vocab, 8)
  args = jax.eval_shape(
    lambda: (
      denoiser.init(KEY, None),
      KEY,
      Requests(
        tokens=jnp.zeros((rows, length), jnp.int32),
        fixed=jnp.zeros((rows, length), bool),
        valid=jnp.ones((rows, length), bool),
        request=jnp.arange(rows),
      ),
    )
  )
  jaxpr = jax.make_jaxpr(
    lambda params, key, requests: generate(
      spec, denoiser, params, Process(), key, requests, trace=trace
    )
  )(*args)
  assert not jaxprs.larger_than(jaxpr, rows * length * vocab)
  # The walk does reach the logits of a chunk, inside three scans.
  assert jaxprs.larger_than(jaxpr, 64 * vocab)
  assert not jaxprs.to_the_host(jaxpr)


def test_padded_columns_are_cut_where_the_network_does_not():
  denoiser, params = network()
  bare = denoiser._replace(
    apply=lambda p, i, c: (
      denoiser.apply(p, i, c)[0].replace(vocab_size=None),
      c,
    )
  )
  out = run(sampler(length=14), ragged(), net=(bare, params))
  assert (np.asarray(out.tokens) < VOCAB).all()


def test_bad_samplers_and_requests():
  with pytest.raises(ValueError, match=r"block_length must lie in \[1, 14\]"):
    sampler(length=14, block=15)
  with pytest.raises(ValueError, match="14 slots a row .* canvas of 8"):
    run(sampler(length=8), ragged())

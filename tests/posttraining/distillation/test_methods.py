"""What distillation methods draw, and what they make of a teacher's answers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.types import Process
from dllm_jax.objectives.autoregressive import Autoregressive
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.objectives.udlm import UDLM
from dllm_jax.posttraining.distillation import (
  answers,
  certainty,
  D3LLM,
  DCD,
  dcd,
  DParallel,
)
from tests import jaxprs, toys

VOCAB, MASK, LENGTH = 9, 8, 12
MDLM_ = MDLM(vocab_size=VOCAB, mask_id=MASK)
KEY = jax.random.key(3)


def _answers(rows=6, counted=True):
  """Returns rows whose slots were revealed from right to left."""
  made = []
  for row in range(rows):
    given, size = 1 + row % 4, 5
    tokens = list(range(given + size))
    steps = list(range(LENGTH - given))[::-1]
    made.append(answers.Answer([t % 7 for t in tokens], given, steps, 9, True))
  rows_ = answers.AnswerRows(made, length=LENGTH, fill=7, counted=counted)
  return rows_.batch(range(rows))


@pytest.mark.parametrize(
  "method", [DParallel(block_size=3), D3LLM(block_sizes=(3, 3), passes=1)]
)
def test_a_block_is_hidden_in_two_parts_and_all_that_follows(method):
  batch = _answers()
  masks = _masks(method, batch, 0.5)
  hidden = masks.z == MASK
  inside, after = masks.masked.any(axis=1), hidden.all(axis=1)
  assert not masks.masked.all(axis=1).any()
  for way in range(2):
    np.testing.assert_array_equal(hidden[:, way] & ~masks.masked[:, way], after)
    assert not (hidden[:, way] & ~batch.loss_mask).any()
  for row in range(len(inside)):
    (block,) = np.nonzero(inside[row])
    assert (np.diff(block) == 1).all()
    np.testing.assert_array_equal(
      np.nonzero(after[row])[0], np.arange(block[-1] + 1, LENGTH)
    )


def test_what_the_teacher_revealed_last_is_hidden():
  batch = _answers()
  method = D3LLM(block_sizes=(6,), passes=1, min_mask_ratio=0.5,
                 max_mask_ratio=0.5)  # fmt: skip
  masks = _masks(method, batch)
  inside = np.asarray(masks.masked.any(axis=1))
  stood = inside.sum(axis=1) // 2  # Answers of one block: half of it stood.
  want = inside & (np.asarray(batch.before) >= stood[:, None])
  np.testing.assert_array_equal(masks.masked[:, 0], want)


def test_slots_count_those_that_stood_before():
  steps = np.array([2, 0, 0, 5, -1, -1])
  np.testing.assert_array_equal(answers.stood_before(steps), [2, 0, 0, 3, 4, 4])


def test_answers_end_at_their_end():
  canvas, steps = np.array([1, 2, 3, 7, 7, 4]), np.arange(6)
  found = answers.answer(canvas, 2, steps, 3, ends=(7,))
  assert (found.tokens, found.ended) == ([1, 2, 3, 7], True)
  assert found.revealed_at == [2, 3, 4, 5]
  assert not answers.answer(canvas, 4, steps, 3, ends=(6,)).ended
  assert answers.answer(canvas, 2, steps, 3, ends=()).ended
  batch = _answers(counted=False)
  np.testing.assert_array_equal(batch.loss_mask.sum(axis=1), batch.length)
  assert (_answers().tokens[:, -1] == 7).all()


@pytest.mark.all
def test_the_split_into_microbatches_changes_nothing():
  batch, method = _answers(), DParallel(block_size=4)
  masks = _masks(method, batch)
  whole = _loss(method, masks, batch)
  halves = [
    _loss(method, *jax.tree.map(lambda x: x[i::2], (masks, batch)))
    for i in (0, 1)
  ]
  for name in ("total", "weight"):
    total = sum(getattr(half, name) for half in halves)
    np.testing.assert_allclose(total, getattr(whole, name), rtol=1e-6)


@functools.cache
def _network():
  denoiser = toys.mixer(VOCAB, 6)
  return denoiser, jax.jit(lambda: denoiser.init(jax.random.key(1), None))()


def _masks(method, batch, progress=0.0):
  draw = lambda key, batch: method.draw(
    MDLM_, Process(), key, batch, jnp.float32(progress)
  )
  return jax.device_get(jax.jit(draw)(KEY, batch))


def _loss(method, masks, batch):
  denoise = _bound()
  loss = lambda masks, batch: method.loss(
    MDLM_, Process(), denoise, masks, batch
  )
  return jax.jit(loss)(masks, batch)


def test_entropy_falls_only_where_the_network_is_right():
  """Without cross-entropy, a step makes it surer of what it has right."""
  batch, method = _answers(), DParallel(block_size=12)
  masks = _masks(method, batch)
  ask = lambda masks, batch: certainty.hidden_terms(
    MDLM_, Process(), _bound(), masks, batch, temperature=1.0, width=LENGTH
  )
  terms = jax.device_get(jax.jit(ask)(masks, batch))
  assert (terms.right.sum() > 0) & (terms.right.sum() < masks.masked.sum())
  assert ((terms.entropy > 0) == terms.right).all()
  assert (terms.nats[terms.right] < np.log(VOCAB)).all()


def _bound():
  denoiser, params = _network()
  return lambda inputs: denoiser.apply(params, inputs, None)[0]


@pytest.mark.all
def test_the_law_of_paths():
  """z_t differs from the clean token as often as the integral says."""
  method, vocab = DCD(steps=4), 11
  x0 = jnp.broadcast_to(jnp.arange(11), (4000, 11))
  latents = dcd.draw_latents(KEY, x0, vocab)
  for t in (0.3, 1.0):
    z = dcd.tokens_at(latents, x0, method.gamma(jnp.full((1, 1), t)))
    kept = float(jnp.mean(z == x0))
    want = float(dcd.kept_probability(method.gamma(jnp.float32(t)), vocab))
    assert abs(kept - want) < 4 * (want * (1 - want) / x0.size) ** 0.5 + 1e-6
  moved = np.asarray(z)[np.asarray(z != x0)]
  share = np.bincount(moved, minlength=vocab) / len(moved)
  np.testing.assert_allclose(share, 1 / vocab, atol=5 / len(moved) ** 0.5)


@pytest.mark.all
def test_the_integral_in_closed_form():
  """Of two tokens the argmax is right with probability Phi(signal / sqrt 2)."""
  gamma = jnp.array([-4.0, -1.0, 2.0])
  found = dcd.kept_probability(gamma, 2)
  want = jax.scipy.stats.norm.cdf(jnp.exp(-gamma / 2) / np.sqrt(2))
  np.testing.assert_allclose(found, want, rtol=2e-6)


def test_a_path_is_nearer_to_the_text_at_the_earlier_time():
  method = DCD(steps=4, round_steps=10)
  run = dcd.Consistent(
    objective=UDLM(vocab_size=VOCAB), denoiser=toys.mixer(VOCAB, 6),
    method=method,
  )  # fmt: skip
  batch = _answers(64)
  draw = lambda step: run.draw(Process(), KEY, batch, step=step)
  path = jax.device_get(jax.jit(draw)(jnp.int32(10)))
  np.testing.assert_allclose(path.t - path.s, 0.5, atol=1e-6)
  wrong_t, wrong_s = (z != batch.tokens for z in (path.z_t, path.z_s))
  assert wrong_s.sum() < wrong_t.sum()
  assert not (wrong_s & ~wrong_t).any()  # a path leaves the text once
  assert not ((wrong_t | wrong_s) & ~batch.loss_mask).any()


@pytest.mark.all
def test_a_teacher_that_agrees_costs_nothing():
  denoiser, params = _network()
  objective = UDLM(vocab_size=VOCAB)
  run = dcd.Consistent(
    objective=objective, denoiser=denoiser, method=DCD(steps=2)
  )
  batch = _answers()
  same = run.draw(Process(), KEY, batch, step=jnp.int32(0))
  same = same.replace(z_s=same.z_t)
  process = Process(constants=params)

  def total(params, process):
    denoise = lambda inputs: denoiser.apply(params, inputs, None)[0]
    loss = run.loss(process, denoise, same, batch, step=jnp.int32(0))
    return loss.total

  np.testing.assert_allclose(total(params, process), 0.0, atol=1e-5)
  other = jax.tree.map(lambda x: 1.1 * x, params)
  value, gradient = jax.value_and_grad(total, argnums=1)(other, process)
  assert value > 0
  assert all((g == 0).all() for g in jax.tree.leaves(gradient))


@pytest.mark.parametrize("kind", ["certainty", "dcd"])
def test_no_value_has_positions_times_vocabulary(kind):
  """With its gradient, at sizes where chunks are smaller than rows."""
  vocab, length = 5000, 640
  denoiser = toys.mixer(vocab, 6)
  params = jax.eval_shape(denoiser.init, KEY, None)
  ids = jax.ShapeDtypeStruct((2, length), jnp.int32)
  mask = jax.ShapeDtypeStruct((2, length), bool)
  one = jax.ShapeDtypeStruct((2,), jnp.int32)
  batch = certainty.Answers(
    tokens=ids, loss_mask=mask, segment_ids=ids, positions=ids, length=one,
    before=ids,
  )  # fmt: skip
  if kind == "dcd":
    objective = UDLM(vocab_size=vocab)
    method = dcd.Consistent(
      objective=objective, denoiser=denoiser, method=DCD()
    )
  else:
    objective = MDLM(vocab_size=vocab, mask_id=vocab - 1)
    method = certainty.Forced(
      objective=objective, method=DParallel(block_size=length), steps=5
    )

  def total(params, teacher, batch):
    process = Process(constants=teacher)
    denoise = lambda inputs: denoiser.apply(params, inputs, None)[0]
    drawn = method.draw(process, KEY, batch, step=jnp.int32(0))
    return method.loss(process, denoise, drawn, batch, step=jnp.int32(0)).total

  jaxpr = jax.make_jaxpr(jax.grad(total))(params, params, batch)
  assert not jaxprs.larger_than(jaxpr, 2 * length * vocab)


def test_bad_methods_and_objectives():
  with pytest.raises(ValueError, match="is for masked diffusion .*dcd"):
    DParallel().check(UDLM(vocab_size=9))
  with pytest.raises(ValueError, match="d3llm is for masked diffusion"):
    D3LLM().check(Autoregressive(vocab_size=9, mask_id=8, bos_id=0))
  with pytest.raises(ValueError, match="dcd is for uniform .*dparallel"):
    DCD().check(MDLM_)
  for make, words in (
    (lambda: DParallel(temperature=0.0), "dparallel.temperature"),
    (lambda: DParallel(normalisation="row"), "legal: masked_sequence, masked"),
    (lambda: D3LLM(block_sizes=()), "d3llm.block_sizes"),
    (lambda: D3LLM(min_mask_ratio=0.9), "d3llm.min_mask_ratio"),
    (lambda: DCD(gamma_min=0.0), "dcd.gamma_min 0.0 must be below"),
    (lambda: DCD(steps=0), "dcd.steps must be at least 1"),
    (lambda: answers.check_room([[1] * 12], 12), "prompt 0 has 12 tokens"),
  ):
    with pytest.raises(ValueError, match=words):
      make()

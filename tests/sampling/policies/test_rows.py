"""What rows choose, applied to logits, against numpy; skipped where nobody does."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.noise import Keyed
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.planning.hlo_text import computations
from dllm_jax.sampling.options import RowOptions, stack
from dllm_jax.sampling.policies.rows import plainly, Rows
from dllm_jax.sampling.policies.unmasking import Unmasking
from tests import jaxprs

VOCAB, MASK = 23, 22
OBJECTIVE = MDLM(vocab_size=VOCAB, mask_id=MASK)
DEFAULTS = RowOptions(end_ids=(4, 9))


def rows_of(*chosen, counts=None, written=None, early=None, width=3):
  made = stack(chosen, defaults=DEFAULTS, objective=OBJECTIVE)
  zeros = np.zeros((len(chosen), 1, VOCAB), np.int32)
  return Rows.of(
    jax.tree.map(jnp.asarray, made),
    counts=zeros if counts is None else counts,
    written=zeros if written is None else written,
    early=np.zeros((len(chosen), width), bool) if early is None else early,
  )


@jax.jit
def shaped(logits, rows):
  cut = rows.shaped(logits, greedy=False)
  return rows.adjusted(logits), cut, rows.shaped(logits, greedy=True)


def log_p(logits):
  logits = np.asarray(logits, np.float64)
  most = logits.max(-1, keepdims=True)
  return logits - most - np.log(np.exp(logits - most).sum(-1, keepdims=True))


def expected(logits, option):
  """Returns one row's logits by sorting, in float64."""
  x = np.asarray(logits, np.float64) / (option.temperature or 1.0)
  for at in range(len(x)):
    order = np.argsort(-x[at], kind="stable")
    keep = np.zeros(VOCAB, bool)
    keep[order[: option.top_k or VOCAB]] = True
    x[at][~keep] = -np.inf
    p = np.exp(log_p(x[at]))
    before = np.cumsum(p[order]) - p[order]
    keep[order[before >= (option.top_p or 1.0)]] = False
    keep &= p >= (option.min_p or 0.0) * p.max() * (1 - 1e-9)
    x[at][~keep] = -np.inf
  return x


SHAPES = (
  RowOptions(temperature=0.0, top_k=2, top_p=0.5),
  RowOptions(temperature=1.0),
  RowOptions(temperature=0.6, top_k=5),
  RowOptions(temperature=1.7, top_p=0.8),
  RowOptions(temperature=1.0, min_p=0.2),
  RowOptions(temperature=0.8, top_k=9, top_p=0.9, min_p=0.03),
  RowOptions(temperature=2.0, top_k=500, top_p=1.0),
)


def test_each_row_is_shaped_as_it_chose():
  logits = 3 * np.random.default_rng(0).normal(size=(len(SHAPES), 3, VOCAB))
  logits = np.float32(logits)
  _, cut, all_cut = shaped(logits, rows_of(*SHAPES))
  np.testing.assert_array_equal(cut[0], logits[0])  # nothing is drawn
  np.testing.assert_array_equal(cut[1], logits[1])
  for row, option in enumerate(SHAPES):
    if row:
      want = expected(logits[row], option)
      np.testing.assert_allclose(cut[row], want, rtol=1e-5)
      np.testing.assert_array_equal(all_cut[row], cut[row])
  np.testing.assert_allclose(all_cut[0], expected(logits[0], SHAPES[0]))


def test_biases_ends_and_penalties_are_each_rows_own():
  rng = np.random.default_rng(1)
  logits = np.float32(2 * rng.normal(size=(4, 3, VOCAB)))
  counts = rng.integers(0, 4, (4, 1, VOCAB)).astype(np.int32)
  written = np.minimum(counts, rng.integers(0, 3, counts.shape)).astype(
    np.int32
  )
  early = np.zeros((4, 3), bool)
  early[1, :2] = True
  chosen = (
    RowOptions(logit_bias={3: 2.5, 7: -100.0, 0: 1.0}),
    RowOptions(end_ids=(5, 0), min_tokens=2),
    RowOptions(
      repetition_penalty=1.5, presence_penalty=0.7, frequency_penalty=-0.25
    ),
    RowOptions(),
  )
  got = shaped(
    logits, rows_of(*chosen, counts=counts, written=written, early=early)
  )[0]
  want = np.array(logits)
  want[0, :, 3] += 2.5
  want[0, :, 7] -= 100.0
  want[0, :, 0] += 1.0
  want[1, :2, [5, 0]] = -np.inf
  x, c, w = want[2], counts[2] > 0, written[2]
  x = np.where(c & (x > 0), x / 1.5, np.where(c, x * 1.5, x))
  want[2] = x + 0.25 * w - 0.7 * (w > 0)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  np.testing.assert_array_equal(got[3], logits[3])


def drawing(*chosen):
  """Returns a function that draws, and its arguments."""
  policy = Unmasking(objective=OBJECTIVE, steps=4)
  shape = len(chosen), 3
  noise = Keyed.at(
    jax.random.key(0),
    request=jnp.arange(shape[0]),
    step=jnp.zeros(shape[0], jnp.int32),
    position=jnp.broadcast_to(jnp.arange(3), shape),
  )

  def draw(logits, rows, noise):
    z = jnp.full(shape, MASK)
    read = policy.filtered(logits, z, rows, None)
    return policy.token(read, z, rows, noise)[0]

  logits = np.random.default_rng(2).normal(size=(*shape, VOCAB))
  return draw, (np.float32(logits), rows_of(*chosen), noise)


def test_greedy_rows_pay_for_no_draw_and_no_cut():
  """Of the optimised program, what draws and cuts lies behind conditions."""
  draw, args = drawing(*[RowOptions(temperature=0.0)] * 2)
  text = jax.jit(draw).lower(*args).compile().as_text()
  program, _ = computations(text)
  branched = [_called(ops, branches=True) for ops in program.values()]
  behind, todo = set(), set().union(*branched)
  while todo:
    behind |= todo
    calls = [_called(program[name], branches=False) for name in todo]
    todo = set().union(*calls) - behind
  codes = lambda names: {op.code for n in names for op in program[n].values()}
  costly = {"exponential", "shift-right-logical", "while"}
  assert costly <= codes(behind)
  assert not costly & codes(program.keys() - behind)


def test_a_greedy_row_beside_a_warm_one():
  draw, args = drawing(RowOptions(temperature=0.0), RowOptions(temperature=1.0))
  made = jaxprs.primitives(jax.make_jaxpr(draw)(*args))
  assert {"cond", "random_bits", "cumsum"} <= made
  best = np.argmax(args[0][..., :MASK], axis=-1)
  got = np.asarray(jax.jit(draw)(*args))
  np.testing.assert_array_equal(got[0], best[0])
  assert (got[1] != best[1]).any()


PLAIN = (
  RowOptions(temperature=0.0),
  RowOptions(temperature=0.0, top_k=1),  # cuts scores where they are sharpened
  RowOptions(temperature=0.0, logit_bias={3: 9.0}),
  RowOptions(temperature=0.7, top_p=0.8),
)


@pytest.mark.parametrize("sharpens", [False, True])
def test_a_plain_look_sees_what_the_general_one_does(sharpens):
  policy = Unmasking(objective=OBJECTIVE, steps=4, sharpens=sharpens, top=2)
  logits = np.random.default_rng(2).normal(size=(2, 3, VOCAB)).astype("float32")
  z, slot = np.full((2, 3), MASK), np.tile(np.arange(3), (2, 1))
  zeros = jnp.zeros(2, jnp.int32)
  noise = Keyed.at(
    jax.random.key(0), request=zeros, step=zeros, position=jnp.asarray(slot)
  )

  @jax.jit
  def both(logits, rows):
    look = lambda policy, rows: policy.draw(logits, z, noise, slot, rows, None)
    return plainly(look, policy, rows), look(policy, rows), rows.plain

  for number, option in enumerate(PLAIN):
    found, expected, plain = both(logits, rows_of(PLAIN[0], option))
    assert plain == (number == 0)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
      found,
      expected,
    )


def _called(ops, *, branches):
  """Returns the computations that operations call, or branch to."""
  how = r"calls|to_apply|body|condition"
  if branches:
    how = r"branch_computations|true_computation|false_computation"
  pattern = rf"\b(?:{how})=(\{{[^}}]*\}}|%?[\w.\-~]+)"
  found = [re.findall(pattern, op.rest) for op in ops.values()]
  names = ",".join(part.strip("{}") for parts in found for part in parts)
  return {name.strip("% ") for name in names.split(",")} - {""}


@pytest.mark.parametrize(
  ("fields", "said"),
  [
    ({"temperature": -1.0}, r"temperature must lie in \[0, inf\), not -1"),
    ({"temperature": float("nan")}, "temperature must lie"),
    ({"top_k": -1}, "top_k must lie"),
    ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
    ({"min_p": 1.5}, "min_p must lie"),
    ({"threshold": 0.0}, "threshold must lie"),
    ({"repetition_penalty": 0.0}, "repetition_penalty must lie"),
    ({"presence_penalty": float("inf")}, "presence_penalty must lie"),
    ({"frequency_penalty": float("inf")}, "frequency_penalty must lie"),
    ({"min_tokens": -1}, "min_tokens must lie"),
    ({"logit_bias": {3: float("nan")}}, "logit_bias of token 3 must lie"),
    ({"logit_bias": {"a": 1.0}}, "token of logit_bias must be a whole number"),
    ({"logit_bias": {-1: 1.0}}, "token of logit_bias must lie"),
    ({"temperature": "hot"}, "temperature must be a number, not 'hot'"),
    ({"top_k": 1.5}, "top_k must be a whole number, not 1.5"),
    ({"seed": True}, "seed must be a whole number"),
    ({"end_ids": ("a",)}, "token of end_ids must be a whole number"),
  ],
  ids=str,
)
def test_a_choice_that_is_illegal_is_refused_by_its_name(fields, said):
  with pytest.raises(ValueError, match=said):
    RowOptions(**fields)


@pytest.mark.parametrize(
  ("fields", "said"),
  [
    ({"end_ids": (VOCAB,)}, r"end_ids has token 23, outside the vocabulary"),
    ({"logit_bias": {VOCAB: 0.0}}, "logit_bias has token 23, outside"),
    ({"end_ids": range(9)}, "end_ids has 9 tokens: there is room for 8"),
    ({"threshold": 0.5}, "threshold means nothing to this sampler"),
  ],
  ids=str,
)
def test_a_choice_that_cannot_be_heeded_is_refused(fields, said):
  with pytest.raises(ValueError, match=said) as caught:
    rows_of(RowOptions(**fields))
  assert "\n" not in str(caught.value)

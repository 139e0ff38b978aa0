"""Scores, selections and revisions on rows that can be worked out by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.objectives.llada import LLaDA
from dllm_jax.sampling.policies import revision, score
from dllm_jax.sampling.policies.selection import (
  bounded,
  Chance,
  CosinePlan,
  EntropyBound,
  Even,
  Everything,
  Factor,
  Progress,
  Proportional,
  Seen,
  Threshold,
  Truncated,
)

OBJECTIVE = LLaDA(vocab_size=5, mask_id=4)
SURE = jnp.array([[0.95, 0.5, 0.9, 0.2, 0.99], [0.1, 0.3, 0.2, 0.4, 0.6]])
CANDIDATES = jnp.array([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]], bool)


def seen(**fields):
  return Seen(
    **({"candidates": CANDIDATES, "score": SURE, "confidence": SURE} | fields)
  )


def at(step, rows=2, maskable=5):
  full = lambda x: jnp.full((rows,), x, jnp.int32)
  return Progress(step=full(step), maskable=full(maskable))


def chosen(selection, *, step=0, steps=5, maskable=5, **fields):
  mask = selection(
    seen(**fields), at(step, maskable=maskable), steps, OBJECTIVE
  )
  return [np.flatnonzero(row).tolist() for row in np.asarray(mask)]


def test_thresholds_take_the_sure_or_the_best():
  assert chosen(Threshold(value=0.9)) == [[0, 2], [4]]
  assert chosen(Threshold(value=1.0)) == [[0], [4]]
  assert chosen(Threshold(value=1e-9)) == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]
  # A plan of 3 is not met by two sure slots.
  planned = Threshold(value=0.9, least=Even(of="window", steps=2))
  assert chosen(planned) == [[0, 1, 2], [1, 3, 4]]


def test_factors_ask_more_of_each_further_slot():
  # 1 - 1/(n + 1): 0.5, 0.67, 0.75, 0.8 for n = 1, 2, 3, 4.
  assert chosen(Factor(value=1.0)) == [[0, 2], [4]]
  assert chosen(Factor(value=1e9)) == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]
  assert chosen(Factor(value=1e-9)) == [[0], [4]]


def test_entropies_are_bounded_but_for_the_greatest():
  h = jnp.array([[0.1, 0.3, 0.2, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
  rule = EntropyBound(value=0.3)
  assert chosen(rule, entropy=h, score=-h) == [[0, 1, 2], [0]]
  assert chosen(EntropyBound(value=0.0), entropy=h, score=-h) == [[0], [0]]
  passed = bounded(jnp.array([[3.0, 0.1, 0.1]]), 0.15)
  np.testing.assert_array_equal(passed, [[True, True, False]])


def test_plans():
  assert chosen(Even(), step=0, steps=3) == [[0, 2], [3, 4]]
  late = CANDIDATES & (SURE > 0.5)
  assert chosen(Even(), step=2, steps=4, candidates=late) == [[0], [4]]
  assert chosen(Everything()) == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]
  # 1 - s / t is 1/5, 1/4, ... on even times: floor(4 / 4), floor(5 / 4).
  assert chosen(Truncated(), step=1) == [[0], [4]]
  assert chosen(Truncated(), step=4) == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]
  # floor(5 cos(pi / 4)) = 3 stay masked.
  assert chosen(CosinePlan(), step=0, steps=2) == [[0], [3, 4]]
  assert chosen(CosinePlan(), step=1, steps=2) == [
    [0, 1, 2, 3],
    [0, 1, 2, 3, 4],
  ]


@pytest.mark.parametrize(
  "rule",
  [
    Threshold(value=1.0),
    Factor(value=1e-9),
    EntropyBound(value=0.0),
    Even(),
    Proportional(),
  ],
)
def test_few_steps_take_their_share_and_the_last_takes_all(rule):
  # Four and five are left.
  h = jnp.ones_like(SURE)
  if not isinstance(rule, Proportional):  # Its plan is its own.
    assert chosen(rule, step=2, steps=4, entropy=h) == [[0, 2], [1, 3, 4]]
  last = chosen(rule, step=3, steps=4, entropy=h)
  assert last == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]


def test_chance_looks_at_no_score():
  uniform = jnp.array([[0.19, 0.21, 0.5, 0.1, 0.1], [0.9] * 5])
  assert chosen(Chance(), uniform=uniform) == [[0, 3], []]
  assert chosen(Chance(), step=4, uniform=uniform)[1] == [0, 1, 2, 3, 4]


def test_scores():
  p = jnp.array([[[0.7, 0.2, 0.1], [0.4, 0.35, 0.25]]])
  token = jnp.array([[0, 1]])
  log_p = jnp.log(p)
  np.testing.assert_allclose(
    score.confidence(log_p, token), [[0.7, 0.35]], rtol=1e-6
  )
  np.testing.assert_allclose(score.margin(log_p), [[0.5, 0.05]], rtol=1e-5)
  np.testing.assert_allclose(
    score.entropy(log_p), -jnp.sum(p * log_p, -1), rtol=1e-6
  )
  slots = jnp.array([[3, 5]])
  left = score.score("left", log_p, None, None, slots)
  assert left[0, 0] > left[0, 1]


def taken(before, z, token, sure, *, step=0, steps=4):
  array = lambda x: jnp.array([x])
  return revision.Taken(
    before=array(before),
    z=array(z),
    token=array(token),
    sure=array(sure),
    active=jnp.ones((1, len(z)), bool),
    step=jnp.array([step]),
    steps=steps,
    maskable=jnp.array([len(z)]),
    mask_id=4,
  )


def test_mask_predict_hides_the_least_sure_also_of_earlier_ones():
  rule = revision.MaskPredict()
  memory = revision.empty((1, 4)).replace(
    confidence=jnp.array([[0.3, 0.9, 0.0, 0.0]])
  )
  # Two old tokens, two new ones; floor(4 (4 - 1 - 1) / 4) = 2 are hidden.
  step = taken(
    [1, 2, 4, 4], [1, 2, 3, 0], [9] * 4, [0.1, 0.1, 0.8, 0.2], step=1
  )
  z, memory = rule(step, memory)
  np.testing.assert_array_equal(z, [[4, 2, 3, 4]])
  np.testing.assert_allclose(memory.confidence, [[0.3, 0.9, 0.8, 0.2]])
  z, _ = rule(step._replace(step=jnp.array([3])), memory)
  np.testing.assert_array_equal(z, [[1, 2, 3, 0]])


def test_edits_wait_for_a_full_window_and_settle():
  rule, memory = revision.Edit(threshold=0.9, extra=2), revision.empty((1, 3))
  part = taken([1, 4, 2], [1, 3, 2], [0, 3, 2], [0.99, 0.5, 0.99])
  z, memory = rule(part, memory)
  np.testing.assert_array_equal(z, [[1, 3, 2]])
  full = taken([1, 3, 2], [1, 3, 2], [0, 1, 2], [0.95, 0.5, 0.99])
  z, memory = rule(full, memory)
  np.testing.assert_array_equal(z, [[0, 3, 2]])
  assert not rule.done(memory, jnp.array([True]))[0]
  same = taken([0, 3, 2], [0, 3, 2], [0, 1, 2], [0.95, 0.5, 0.99])
  _, memory = rule(same, memory)
  assert rule.done(memory, jnp.array([True]))[0]
  always = revision.Edit(always=True)
  z, _ = always(part, revision.empty((1, 3)))
  np.testing.assert_array_equal(z, [[0, 3, 2]])


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: Threshold(value=0.0), r"\(0, 1\]"),
    (lambda: Threshold(value=1.1), r"\(0, 1\]"),
    (lambda: Factor(value=0.0), "above 0"),
    (lambda: EntropyBound(value=-1.0), "0 or more"),
    (lambda: revision.Edit(threshold=-0.1), r"\[0, 1\]"),
  ],
)
def test_bad_values(make, message):
  with pytest.raises(ValueError, match=message):
    make()

"""Processors against references that sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.sampling.policies.processors import (
  Banned,
  compose,
  Forced,
  RepetitionPenalty,
  Temperature,
  TopK,
  TopP,
)


def applied(processor, logits):
  run = jax.jit(lambda logits: processor(logits, None, None))
  return np.asarray(run(np.float32(logits)))


def kept(processor, logits):
  out = applied(processor, logits)
  keep = np.isfinite(out)
  np.testing.assert_array_equal(out[keep], np.asarray(logits)[keep])
  return keep


def sorted_reference(logits, enough):
  """Keeps tokens in falling order until `enough(probabilities so far)`."""
  logits = np.asarray(logits, np.float64)
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  keep = np.zeros(p.shape, bool)
  for at in np.ndindex(*p.shape[:-1]):
    chosen = []
    for token in np.argsort(-p[at], kind="stable"):
      if enough(p[at][chosen]):
        break
      chosen.append(token)
    keep[at][chosen] = True
  return keep


@pytest.fixture(name="logits")
def _logits():
  rng = np.random.default_rng(0)
  return 3.0 * rng.normal(size=(3, 5, 101)).astype(np.float32)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_equals_a_sort(logits, p):
  want = sorted_reference(logits, lambda q: q.sum() >= p)
  np.testing.assert_array_equal(kept(TopP(p), logits), want)


@pytest.mark.parametrize("k", [1, 2, 17, 100, 500])
def test_top_k_equals_a_sort(logits, k):
  want = sorted_reference(logits, lambda q: len(q) >= k)
  np.testing.assert_array_equal(kept(TopK(k), logits), want)


def test_equal_tokens_are_taken_by_id():
  flat = np.zeros((1, 1, 8))
  assert kept(TopP(0.5), flat)[0, 0].tolist() == [True] * 4 + [False] * 4
  assert kept(TopK(3), flat)[0, 0].tolist() == [True] * 3 + [False] * 5
  some = np.array([[[0.0, 1.0, 2.0, 1.0]]], np.float32)
  assert kept(TopK(2), some)[0, 0].tolist() == [False, True, True, False]
  assert kept(TopP(0.7), some)[0, 0].tolist() == [False, True, True, False]


def test_forbidden_tokens_stay_forbidden():
  logits = np.array([[[-np.inf, 2.0, -np.inf, 1.0]]])
  for processor in (TopP(0.999), TopK(3), Temperature(0.0), Temperature(2.0)):
    out = applied(processor, logits)
    assert not np.isnan(out).any()
    assert np.isneginf(out[0, 0, [0, 2]]).all() and np.isfinite(out[0, 0, 1])


def test_temperature():
  logits = np.array([[[0.0, 3.0, 3.0, 1.0]]])
  np.testing.assert_array_equal(applied(Temperature(0.5), logits), 2.0 * logits)
  best = applied(Temperature(0.0), logits)
  assert np.isfinite(best).tolist() == [[[False, True, False, False]]]


def test_compose_applies_in_order():
  logits = np.log(np.array([[[0.5, 0.3, 0.2]]], np.float32))
  composed = lambda *processors: jax.jit(
    lambda logits: compose(processors, logits, None)
  )(logits)
  # Cooled first, the best token has probability 0.66 and fills the nucleus.
  cooled = composed(Temperature(0.5), TopP(0.6))
  assert np.isfinite(cooled).sum() == 1
  cut = composed(TopP(0.6), Temperature(0.5))
  assert np.isfinite(cut).sum() == 2


@pytest.mark.parametrize(
  "make",
  [
    lambda: TopP(0.0),
    lambda: TopP(1.5),
    lambda: TopK(0),
    lambda: Temperature(-1.0),
  ],
)
def test_bad_values(make):
  with pytest.raises(ValueError):
    make()


def test_repetition_is_penalised_where_a_token_stands():
  logits = jnp.array([[[2.0, -2.0, 1.0, -1.0]]])
  counts = jnp.array([[[1, 3, 0, 0]]])
  got = RepetitionPenalty(2.0)(logits, None, counts)
  np.testing.assert_array_equal(got, [[[1.0, -4.0, 1.0, -1.0]]])
  with pytest.raises(ValueError, match="above 0"):
    RepetitionPenalty(0.0)


def test_banned_and_forced_tokens():
  logits = np.zeros((1, 1, 4))
  inf = np.inf
  banned = applied(Banned((0, 2)), logits)
  np.testing.assert_array_equal(banned, [[[-inf, 0, -inf, 0]]])
  forced = applied(Forced((0, 2)), logits)
  np.testing.assert_array_equal(forced, [[[0, -inf, 0, -inf]]])
  with pytest.raises(ValueError, match="at least one"):
    Forced(())


def test_a_nucleus_without_the_token_that_crosses_p():
  logits = np.log(np.array([[[0.5, 0.3, 0.15, 0.05]]]))
  kept = lambda p: (applied(TopP(p, crossing=False), logits) > -1e9)[0, 0]
  np.testing.assert_array_equal(kept(0.85), [True, True, False, False])
  np.testing.assert_array_equal(kept(0.3), [True, False, False, False])

"""Texts read from left to right: their sums are the estimators' figures."""

import jax
import numpy as np
import pytest

from dllm_jax.evaluation.likelihood.reading import estimator, Reader
from dllm_jax.evaluation.likelihood.scorer import Item, Scorer
from dllm_jax.objectives.diffusion_gemma import DiffusionGemma
from tests import runs
from tests.quick import long

TEXT = "To be, or not to be: that is"
NAMES = {
  "mdlm": ("left", {"objective__name": "mdlm"}),
  "autoregressive": ("exact", {"objective__name": "autoregressive"}),
  "dream": ("left", {"objective__name": "dream"}),
  "bd3lm": ("left", {"objective__name": "bd3lm", "objective__block_size": 4}),
}


def read(run, *, rows=4, top=3, text=TEXT, **how):
  """Returns (tokens, a scorer, what it reads)."""
  ids = [int(i) for i in run.tokenizer.encode(text)]
  scorer = Scorer.of(run, estimator=estimator(run.objective))
  rng = np.random.default_rng(0)  # untrained it holds all tokens alike
  shaken = lambda x: x + rng.normal(scale=0.3, size=x.shape).astype(x.dtype)
  scorer._params = jax.tree.map(shaken, jax.device_get(scorer._params))
  return ids, scorer, Reader(scorer, rows=rows, top=top)(ids, **how)


@pytest.mark.parametrize(
  "name", ["mdlm", *map(long, ("autoregressive", "dream", "bd3lm"))]
)
def test_sums_are_the_figures_of_answers(tmp_path, name):
  wanted, fields = NAMES[name]
  run = runs.run(tmp_path / "run", **fields)
  run.start()
  ids, scorer, found = read(run, top=run.tokenizer.vocab_size - 1)
  assert found.log_probs.std() > 0.1
  assert scorer.estimator == wanted
  items = [Item(tokens=tuple(ids), given=n) for n in (1, 5, len(ids) - 2)]
  nats = scorer.score(items, samples=1, key=jax.random.key(0), rows=4)
  for item, nat in zip(items, nats, strict=True):
    sum_ = found.log_probs[item.given - 1 :].sum()
    assert sum_ == pytest.approx(-nat, abs=1e-4)
  assert found.calls == (1 if wanted == "exact" else -(-(len(ids) - 1) // 4))
  # What is likeliest is told best first, and is at least as likely.
  best = found.top_log_probs
  assert (
    np.diff(best, axis=1) <= 0
  ).all() and found.top_ids.shape == best.shape
  assert (best[:, 0] >= found.log_probs - 1e-6).all()
  at = found.top_ids == np.asarray(ids[1:])[:, None]
  told = np.where(at, best, 0.0).sum(axis=1)
  np.testing.assert_allclose(told, found.log_probs, atol=1e-6)


@pytest.mark.all
def test_what_follows_is_not_seen_and_short_texts_are_read(tmp_path):
  run = runs.run(tmp_path / "run")
  run.start()
  _, _, one = read(run)
  other = TEXT[:-3] + "xyz"
  _, _, two = read(run, text=other)
  count = len(TEXT) - 4
  np.testing.assert_allclose(
    one.log_probs[:count], two.log_probs[:count], atol=1e-6
  )
  assert (one.log_probs[count:] != two.log_probs[count:]).any()
  for text in ("", "a"):
    _, _, none = read(run, text=text)
    assert none.calls == 0 and none.log_probs.shape == (0,)
    assert none.top_ids.shape == (0, 3)


def test_nobody_waits_for_what_is_gone(tmp_path):
  run = runs.run(tmp_path / "run")
  run.start()
  asked = iter([False, True, True, True, True, True, True, True])
  _, _, found = read(run, gone=lambda: next(asked))
  assert found.calls == 1 and found.log_probs.shape == (4,)


def test_networks_with_passes_of_their_own_are_not_read():
  gemma = DiffusionGemma(vocab_size=16, canvas=4)
  with pytest.raises(ValueError, match="passes of its own"):
    estimator(gemma)

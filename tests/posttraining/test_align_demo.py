"""What alignment does to answers that are sampled, and shared noise to variance.

    pytest -m all -s tests/posttraining/test_align_demo.py

A network learns to say, when told a word, its first letter three times or its
last one, as often; then to prefer whichever comes first in the alphabet. The
figures of docs/preferences.md are what this prints.
"""

import dataclasses
import json
import random

import jax
import numpy as np
import pytest

from dllm_jax.config import config as configs
from dllm_jax.core.paths import Path
from dllm_jax.evaluation.benchmarks import instructions
from dllm_jax.posttraining import preferences, reference
from dllm_jax.posttraining.align import Alignment
from dllm_jax.posttraining.vrpo import Preference, VRPO
from dllm_jax.sampling import requests
from tests import runs

pytestmark = pytest.mark.all

_ANSWER = 8  # slots


def _words(number, held_out=False):
  asked = instructions.questions(("copy",), number, seed=0, held_out=held_out)
  words = [question.word for question in asked]
  return [word for word in words if word[0] != word[-1]]


def _said(word, letter):
  return [
    {"role": "user", "content": f"say {word}"},
    {"role": "assistant", "content": 3 * letter},
  ]


def _write(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp("demo")
  rng = random.Random(0)
  words = _words(8000)
  talks = [
    {"messages": _said(word, rng.choice((word[0], word[-1])))} for word in words
  ]
  pairs = [
    dict(
      zip(
        ("chosen", "rejected"),
        (_said(word, letter) for letter in sorted((word[0], word[-1]))),
        strict=True,
      )
    )
    for word in words[:1000]
  ]
  _write(folder / "pairs.jsonl", pairs)
  resolved = configs.load("finetune_smoke")
  resolved.data.update({
    "path": _write(folder / "talks.jsonl", talks),
    "tokenizer": instructions.write_tokenizer(Path(folder / "tokenizer")),
    "length": 24,
  })
  resolved.model.update({"width": 64, "layers": 2, "unroll": 2})
  resolved.training.steps = 300
  resolved.evaluation.update({"every_steps": 0, "sample_every": 0})
  resolved.logging.progress = False
  run = runs.Run.create(resolved, folder / "base", devices=jax.devices()[:1])
  run.train()
  return run


@pytest.fixture(scope="module")
def aligned(base):
  resolved = configs.stored(base.workdir)
  resolved.data.path = str(base.workdir.parent / "pairs.jsonl")
  resolved.optimizer.learning_rate = 0.001
  resolved.training.update({"steps": 150, "batch_size": 16})
  alignment = Alignment.create(
    base,
    base.workdir.parent / "aligned",
    resolved,
    VRPO(n_t=4, sft_weight=0.5),
  )
  summary = alignment.train()
  print(f"held-out accuracy {summary['eval_accuracy']:.3f}")
  return alignment


def _shares(run):
  """Returns the shares of sampled answers that are preferred, and rejected."""
  words = _words(300, held_out=True)
  rows = [
    [*map(int, run.tokenizer.chat(_said(word, "a")[:1])), *[None] * _ANSWER]
    for word in words
  ]
  sampler = dataclasses.replace(run.config.sampler, temperature=1.0)
  found = run.sample_rows(rows, length=24, seed=1, sampler=sampler)
  answers = [
    run.tokenizer.decode(
      requests.answered(list(map(int, ids)), row, run.tokenizer.end_ids)
    ).strip()
    for ids, row in zip(found.generation.tokens, rows, strict=True)
  ]
  ends = [sorted((word[0], word[-1])) for word in words]
  return [
    np.mean([a == 3 * e[i] for a, e in zip(answers, ends, strict=True)])
    for i in range(2)
  ]


def test_preferred_answers_are_sampled(base, aligned):
  before, after = _shares(base), _shares(aligned.run)
  print("preferred, rejected:", *np.round([before, after], 3))
  assert 0.4 < before[0] < 0.6 and sum(before) > 0.95
  assert after[0] > 0.8


def test_shared_noise_has_less_variance(base, aligned):
  run, pairs = aligned.run, aligned.pairs.held_out[:32]
  tokens = preferences.answer_tokens(pairs)
  states = {True: base.state, False: run.state}

  def variance(**fields):
    """Returns the variance of a pair's score over draws, mean over pairs."""
    method = VRPO(beta=1.0, **fields)
    loss = Preference(objective=run.objective, method=method, seed=0)
    asks = {
      old: reference.asker(
        loss, run.objective, run.denoiser, run.mesh, reference=old
      )
      for old in states
    }

    def scores(noise):
      ((_, _, batch),) = reference.parts(
        pairs, noise, method.samples, run.mesh, size=len(pairs), length=24
      )
      new, old = (
        asks[key](states[key].eval_params, states[key].process, batch)
        for key in (False, True)
      )
      return method.scores(new - old, tokens).mean(axis=-1)

    return np.var([scores(i) for i in range(32)], axis=0, ddof=1).mean()

  for n_t, n_yt in ((1, 1), (4, 1), (2, 2), (8, 1)):
    of = lambda shared: variance(n_t=n_t, n_yt=n_yt, shared_noise=shared)  # noqa: B023
    shared, own = of(True), of(False)
    print(f"n_t {n_t} n_yt {n_yt} shared {shared:.2f} own {own:.2f}")
    assert shared < own

"""Quality of texts: closed forms, the task, and judges that cannot judge."""

import json
import math

import numpy as np
import pytest

from dllm_jax.cli.main import main
from dllm_jax.evaluation import quality
from dllm_jax.evaluation.judge import open_judge


def test_closed_forms():
  assert quality.unigram_entropy([1, 1, 2, 2, 3, 3, 4, 4]) == pytest.approx(2)
  assert quality.unigram_entropy([5] * 9) == 0
  assert quality.distinct([[1, 2, 1, 2], [1, 2]], 2) == pytest.approx(2 / 4)
  assert quality.distinct([[1]], 2) == 0
  same, other = (
    [[1, 2, 3, 4, 5, 6]] * 3,
    [[i + 10 * k for i in range(6)] for k in range(3)],
  )
  assert quality.self_bleu(same) == pytest.approx([100.0] * 3)
  assert max(quality.self_bleu(other)) < 5


def test_mauve_between_equal_and_apart():
  rng = np.random.default_rng(0)
  one, two = rng.normal(size=(2, 200, 8))
  far = two + 50.0 * np.eye(8)[0]
  assert quality.mauve(one, one, clusters=8) == pytest.approx(1.0, abs=1e-3)
  near = quality.mauve(one, two, clusters=8)
  assert near > 0.9 > 0.1 > quality.mauve(one, far, clusters=8)
  # Two clusters, P and Q known: the frontier by hand.
  p, q = np.zeros((10, 1)), np.zeros((10, 1))
  p[:8] += 1.0
  q[:5] += 1.0
  share = np.linspace(1e-6, 1 - 1e-6, 25)[:, None]
  hp, hq = np.array([0.2, 0.8]), np.array([0.5, 0.5])
  r = share * hp + (1 - share) * hq
  x = np.exp(-5 * np.sum(hq * np.log(hq / r), axis=1))
  y = np.exp(-5 * np.sum(hp * np.log(hp / r), axis=1))
  x, y = [1.0, *x[np.argsort(-x)], 0.0], [0.0, *y[np.argsort(-x)], 1.0]
  by_hand = -np.trapezoid(y, x)
  assert quality.mauve(p, q, clusters=2) == pytest.approx(by_hand, rel=1e-6)


def test_the_task(workdir, judge, capsys):
  args = ["evaluate", f"--workdir={workdir}", "--task=generation"]
  few = ["--num_samples=6", "--batch_size=4", "--sampler.steps=4"]
  assert main([*args, f"--judge={judge}", *few]) == 0
  found = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert found["texts"] == found["held_out"]["texts"] == 6
  assert found["protocol"]["sampler"]["steps"] == 4
  assert 1 < found["generative_perplexity"] < 1e4
  assert found["generative_perplexity_error"] > 0
  assert 0 < found["mauve"] <= 1 and 0 < found["distinct_1"] <= 1
  assert 0 < found["unigram_entropy_bits"] <= 5
  assert main([*args, f"--judge={workdir}", *few]) == 2
  said = capsys.readouterr().err.strip().splitlines()
  assert "not autoregressive" in said[-1]
  assert main(args) == 2 and "--judge must be given" in capsys.readouterr().err
  assert main([*args, "--judge=nowhere"]) == 2


def test_a_judge_is_its_own_likelihood(judge):
  opened = open_judge(str(judge))
  texts = ["To be, or not", "x"]
  together = opened.nats(texts, rows=4)
  assert [n for _, n in together] == [13, 1]
  assert together[1][0] == pytest.approx(opened.nats(["x"], rows=4)[0][0])
  # The chain rule: a text costs no less than its beginning.
  shorter = opened.nats(["To be, or no"], rows=4)[0][0]
  assert 0 < together[0][0] - shorter < 20 and math.isfinite(shorter)
  assert opened.features(texts, rows=4).shape == (2, 16)

"""Quality of texts: closed forms, the task, and judges that cannot judge."""

import json
import math

import jax
import numpy as np
import pytest

from dllm_jax.cli.main import main
from dllm_jax.evaluation.samples import quality
from dllm_jax.evaluation.samples.judge import open_judge
from dllm_jax.pretrained import load_pretrained
from tests.data.test_chat import folder as tokenizer_folder
from tests.pretrained.golden import publish


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
  assert quality.words("O, 'tis the Duke's\n2 ends.") == [
    "o", "tis", "the", "duke's", "ends",
  ]  # fmt: skip
  known = "The end, the Duke's"
  assert quality.word_share(["the END", "xx duke's"], known) == 0.75
  assert quality.word_share(["12 !"], known) == 0


@pytest.mark.all
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


@pytest.mark.all
def test_the_task(workdir, judge, capsys):
  args = ["evaluate", f"--workdir={workdir}", "--task=generation"]
  few = ["--num_samples=6", "--batch_size=4", "--sampler.steps=4"]
  assert main([*args, f"--judge={judge}", *few]) == 0
  found = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert found["texts"] == found["held_out"]["texts"] == 6
  assert found["protocol"]["sampler"]["steps"] == 4
  assert 1 < found["generative_perplexity"] < 1e4
  assert found["generative_perplexity_error"] > 0
  assert 0 <= found["word_share"] < found["held_out"]["word_share"] <= 1
  assert 0 < found["mauve"] <= 1 and 0 < found["distinct_1"] <= 1
  assert 0 < found["unigram_entropy_bits"] <= 5
  assert main([*args, f"--judge={workdir}", *few]) == 2
  said = capsys.readouterr().err.strip().splitlines()
  assert "not autoregressive" in said[-1]
  assert main(args) == 2 and "--judge must be given" in capsys.readouterr().err
  assert main([*args, "--judge=nowhere"]) == 2


@pytest.mark.all
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


@pytest.mark.parametrize("begin", ["<s>", None])
@pytest.mark.all
def test_a_published_folder_judges(begin, tmp_path):
  fields = {"model_type": "qwen2", "architectures": ..., "mask_token_id": ...}
  folder = publish("dream_logits", tmp_path, bos_token_id=..., **fields)
  tokenizer_folder(folder, mask_token=None, bos_token=begin)
  if begin is None:  # nor is there a token that is named like one
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<s>", "<x>"))
  opened = open_judge(str(folder))
  # Nothing predicts the first token where texts begin with none of their own.
  first = [] if begin is None else [3]
  ids = [*first, 0, 1, 1, 0]
  logits = load_pretrained(folder).logits(np.asarray([ids]))[0, :-1]
  logits = logits.at[:, -1].set(-np.inf)  # the last row stands for a mask
  log_p = np.asarray(jax.nn.log_softmax(logits))
  expected = -log_p[np.arange(len(ids) - 1), ids[1:]].sum()
  ((nats, tokens),) = opened.nats(["a b b a"], rows=1)
  assert nats == pytest.approx(expected, rel=1e-4) and tokens == len(ids) - 1
  if begin is None:
    assert opened.nats(["a"], rows=1) == [(0.0, 0)]


def test_a_published_folder_that_cannot_judge(workdir, tmp_path, capsys):
  folder = publish("llada_logits", tmp_path / "llada")
  before = sorted(workdir.rglob("*"))
  args = ["evaluate", f"--workdir={workdir}", "--task=generation"]
  assert main([*args, f"--judge={folder}"]) == 2
  (said,) = capsys.readouterr().err.strip().splitlines()
  assert f"{folder} holds LLaDA, which is not autoregressive" in said
  assert sorted(workdir.rglob("*")) == before

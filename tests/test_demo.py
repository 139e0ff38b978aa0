"""The demo, in a quarter of its steps: it writes words."""

import pathlib

import pytest

from dllm_jax import config
from dllm_jax.data import source
from dllm_jax.evaluation.samples import quality
from dllm_jax.run import Run


@pytest.mark.all
def test_the_demo_writes_words(tmp_path):
  resolved = config.load("demo")
  resolved.training.steps = resolved.training.steps // 4
  resolved.evaluation.every_steps = 0
  run = Run.create(resolved, tmp_path / "run")
  run.train()
  assert run.evaluate(limit=8)["bits_per_char"] < 3.0
  [path] = source.find("shakespeare")
  known = pathlib.Path(path).read_text(encoding="utf-8")
  texts = run.sample(["ROMEO:", ""], num_samples=4).texts
  assert all(text.startswith("ROMEO:") for text in texts[:4])
  assert quality.word_share(texts, known) > 0.6

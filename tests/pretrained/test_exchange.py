"""Published folders become runs, are sampled, tuned, and go back."""

import json
import math

import jax
import numpy as np
from numpy.testing import assert_allclose
import pytest

import dllm_jax
from dllm_jax.cli.main import main
from dllm_jax.run.run import Run
from tests import golden_cases
from tests.pretrained.golden import plain, publish, vocabulary
from tests.quick import long


def dllm(capsys, *argv):
  status = main(list(argv))
  written = capsys.readouterr()
  assert status == 0, written.err
  return json.loads(written.out.splitlines()[-1])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp("text") / "numbers.txt"
  # Ids that are plain words to every case that is tuned on them.
  ids = sorted(set(plain("llada_logits")) & set(plain("dream_logits")))
  rows = np.random.default_rng(0).choice(ids[:60], (200, 12))
  path.write_text("\n".join(" ".join(map(str, row)) for row in rows))
  return path


TUNE = (
  "--config.training.steps=20",
  "--config.optimizer.learning_rate=0.01",
  "--config.optimizer.warmup_steps=0",
  "--config.logging.progress=false",
)


@pytest.mark.all
@pytest.mark.parametrize(
  "name, change",
  [
    pytest.param("llada_logits", (), id="whole"),
    pytest.param(
      "dream_logits", ("--config.model.adapter.rank=4",), id="adapters"
    ),
  ],
)
def test_tuned_models_go_back(name, change, text, tmp_path, capsys):
  source = publish(name, tmp_path / "in")
  workdir = tmp_path / "run"
  told = dllm(
      capsys, "convert", f"--from_hf={source}", f"--workdir={workdir}",
      "--length=24",
  )  # fmt: skip
  theirs = golden_cases.weights(name)
  assert told["family"] == name.split("_")[0]
  assert told["tensors_used"] == len(theirs)
  assert told["tensors_unused"] == []
  assert told["parameters"] == sum(x.size for x in theirs.values())

  prompt = " ".join(map(str, plain(name)[1:4]))
  sampled = dllm(
      capsys, "sample", f"--workdir={workdir}", f"--prompt={prompt}",
      "--sampler.steps=4", "--length=16",
  )  # fmt: skip
  assert sampled["samples"][0].startswith(prompt + " ")

  data = f"--config.data.path={text}"
  before = dllm(capsys, "train", f"--workdir={workdir}", data, *TUNE, *change)
  assert before["step"] == 20
  figures = dllm(
    capsys, "evaluate", f"--workdir={workdir}", "--batches=1", "--passes=2"
  )
  uniform = math.log2(vocabulary(name))
  assert 0 < figures["bits_per_token"] < uniform + 3

  dllm(capsys, "convert", f"--to_hf={tmp_path / 'out'}", f"--workdir={workdir}")
  back = dllm_jax.load_pretrained(tmp_path / "out")
  first = dllm_jax.load_pretrained(source)
  assert back.published == first.published
  assert set(back.source.dtypes) == set(theirs)

  run = Run.open(workdir)
  tokens = golden_cases.load(name).arrays["input_ids"]
  inputs = first._inputs(tokens, None, None, None)
  out, _ = run.denoiser.apply(run.state.params["model"], inputs, None)
  tuned = np.asarray(out.hidden @ out.unembed)[..., : out.vocab_size]
  # Merging adapters is another order of the same float32 products.
  assert_allclose(back.logits(tokens), tuned, atol=1e-4, rtol=1e-4)
  assert np.abs(tuned - np.asarray(first.logits(tokens))).max() > 0.1
  if change:
    changed = jax.tree.map(
      lambda a, b: bool((a != b).any()), back.params, first.params
    )
    assert not changed["embed"]["embedding"]
    assert not changed["layers"]["attention"]["q"]["bias"]
    assert changed["layers"]["attention"]["q"]["kernel"]


@pytest.mark.parametrize(
    "name",
    [*map(long, ("bd3lm", "llada2_moe", "sedd_absorb", "llada_moe", "sdar", "mdlm", "sedd_uniform"))],
)  # fmt: skip
def test_there_and_back(name, tmp_path, capsys):
  source, workdir = publish(name, tmp_path / "in"), tmp_path / "run"
  dllm(capsys, "convert", f"--from_hf={source}", f"--workdir={workdir}")
  out = tmp_path / "out"
  dllm(capsys, "convert", f"--to_hf={out}", f"--workdir={workdir}")
  from safetensors.numpy import load_file

  theirs, back = (
    golden_cases.weights(name),
    load_file(out / "model.safetensors"),
  )
  assert set(back) == set(theirs)
  for key, tensor in theirs.items():
    assert back[key].tobytes() == tensor.tobytes(), key


@pytest.mark.all
@pytest.mark.parametrize(
  "name",
  ["bd3lm"]
  + [
    pytest.param(name, marks=pytest.mark.all)
    for name in ("llada2_moe", "sdar", "mdlm", "sedd_uniform")
  ],
)
def test_samples_with_its_preset(name, tmp_path, capsys):
  source, workdir = publish(name, tmp_path / "in"), tmp_path / "run"
  dllm(capsys, "convert", f"--from_hf={source}", f"--workdir={workdir}")
  block = Run.open(workdir).objective.block_length
  length = block * max(1, 32 // block) if block else 32
  # First hitting reveals one at a time.
  steps = block if name == "bd3lm" else 2
  sampled = dllm(
      capsys, "sample", f"--workdir={workdir}", f"--sampler.steps={steps}",
      f"--length={length}",
  )  # fmt: skip
  assert len(sampled["samples"][0].split()) == length


@pytest.mark.all
def test_bfloat16_runs(text, tmp_path, capsys):
  source, workdir = publish("llada_logits", tmp_path / "in"), tmp_path / "run"
  dllm(
      capsys, "convert", f"--from_hf={source}", f"--workdir={workdir}",
      "--dtype=bfloat16", "--length=16",
  )  # fmt: skip
  params = Run.open(workdir).state.params["model"]
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("bfloat16")}
  tuned = dllm(
      capsys, "train", f"--workdir={workdir}", f"--config.data.path={text}",
      *TUNE, "--config.training.steps=2",
      "--config.model.param_dtype=float32",
  )  # fmt: skip
  assert tuned["step"] == 2
  params = Run.open(workdir).state.params["model"]
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
  # Once it has trained, a run is itself.
  other = ["train", f"--workdir={workdir}", "--config.data.length=32"]
  assert main(other) == 2
  assert "holds a run with another config" in capsys.readouterr().err

"""The model of lm-evaluation-harness: its class, and the real command."""

import json
import os
import types

import jax
import numpy as np
import pytest

# Read once, when the harness's libraries are imported.
os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}

pytest.importorskip("lm_eval")

from dllm_jax.cli.main import main  # noqa: E402
from dllm_jax.evaluation import likelihood, protocols  # noqa: E402
from dllm_jax.evaluation.harness import DiffusionLM  # noqa: E402
from dllm_jax.evaluation.scorer import Item  # noqa: E402


def ask(*args):
  return [types.SimpleNamespace(args=arg) for arg in args]


@pytest.fixture(scope="module")
def model(workdir):
  return DiffusionLM(str(workdir), batch_size=4, mc_num=8)


def test_ragged_requests_are_answered_as_if_alone(model):
  pairs = [("To be ", "or not"), ("", "a"), ("x" * 40, "yes"), ("Hi", " you")]
  with pytest.warns(UserWarning, match="is_greedy is reported as False|cut"):
    together = model.loglikelihood(ask(*pairs), disable_tqdm=True)
  values = [value for value, _ in together]
  assert max(values) < 0
  alone = [
    model.loglikelihood(ask(pair), disable_tqdm=True)[0][0] for pair in pairs
  ]
  np.testing.assert_allclose(values, alone, rtol=1e-4)
  # White space at a context's end is the continuation's.
  item = model._pair("To be ", "or not")
  assert item.given == 5 and item.targets == 7


def test_rolling_is_the_sum_of_windows(model):
  text = "To be, or not to be, that is the question."
  found = model.loglikelihood_rolling(ask((text,)), disable_tqdm=True)[0]
  ids = [int(i) for i in model._run.tokenizer.encode(text)]
  first, second = likelihood.windows(ids, length=32)
  parts = [
    model._scorer.score(
      [part],
      samples=8,
      key=jax.random.fold_in(jax.random.key(0), 0),
      rows=4,
    )[0]
    for part in (first, second)
  ]
  assert isinstance(first, Item)
  np.testing.assert_allclose(found, -sum(parts), rtol=1e-4)
  with pytest.raises(ValueError, match="empty document"):
    model.loglikelihood_rolling(ask(("",)))


def test_generation_stops_at_until_and_is_deterministic(model):
  kwargs = {"until": ["\n"], "max_gen_toks": 20}
  asked = [("To be", kwargs), ("a", {"until": [], "max_gen_toks": 20})]
  first = model.generate_until(ask(*asked), disable_tqdm=True)
  again = model.generate_until(ask(*asked[::-1]), disable_tqdm=True)
  assert first == again[::-1]
  assert "\n" not in first[0] and len(first[1]) == 20
  full = ("To be", {"until": [], "max_gen_toks": 20})
  whole = model.generate_until(ask(full), disable_tqdm=True)[0]
  assert first[0] == whole.split("\n")[0]
  for kwargs, said in (
    ({"num_beams": 4}, "cannot be asked for num_beams"),
    ({"max_gen_toks": 99}, "longer than the canvas of 32"),
  ):
    with pytest.raises(ValueError, match=said):
      model.generate_until(ask(("a", kwargs)))
  with pytest.raises(ValueError, match="empty answer"):
    model.loglikelihood(ask(("a", "")))
  with pytest.raises(ValueError, match="does not fit the canvas"):
    model.loglikelihood(ask(("a", "b" * 40)))


def test_protocols_are_published_settings():
  llada = protocols.named("llada", {"mc_num": 32, "block_length": 4})
  assert llada.estimator == "counts" and llada.mc_num == 32
  assert dict(llada.fields) == {"temperature": 0.0, "block_length": 4}
  assert protocols.PROTOCOLS["llada"].mc_num == 128
  assert protocols.PROTOCOLS["llada_single"].mc_num == 1
  assert protocols.PROTOCOLS["dream"].estimator == "times"
  with pytest.raises(ValueError, match="legal: default, llada"):
    protocols.named("gpt", {})
  with pytest.raises(ValueError, match="unknown --model_args speed; legal"):
    protocols.named("llada", {"speed": 9})
  with pytest.raises(ValueError, match="multiple of 16"):
    protocols.named("llada", {"mc_num": 40})


def _task(folder, name, rows, **fields):
  data = folder / f"{name}.jsonl"
  data.write_text("\n".join(json.dumps(row) for row in rows))
  config = {
    "task": name,
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(data)}},
    "test_split": "test",
    "metadata": {"version": 1},
    **fields,
  }
  # JSON is YAML.
  (folder / f"{name}.yaml").write_text(json.dumps(config))


@pytest.fixture
def tasks(tmp_path):
  _task(
    tmp_path,
    "toy_choice",
    [{"q": "To be or", "c": ["not", "yes sir"], "a": i} for i in (0, 1, 0)],
    output_type="multiple_choice",
    doc_to_text="{{q}}",
    doc_to_choice="{{c}}",
    doc_to_target="{{a}}",
    metric_list=[{"metric": "acc"}],
  )
  _task(
    tmp_path,
    "toy_rolling",
    [{"text": "To be, or not to be, that is the question."}, {"text": "No."}],
    output_type="loglikelihood_rolling",
    doc_to_text="",
    doc_to_target="{{text}}",
    metric_list=[{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
  )
  _task(
    tmp_path,
    "toy_generation",
    [{"q": "ROMEO:", "a": "x"}, {"q": "A", "a": "y"}],
    output_type="generate_until",
    doc_to_text="{{q}}",
    doc_to_target="{{a}}",
    generation_kwargs={"until": ["\n"], "max_gen_toks": 8},
    metric_list=[{"metric": "exact_match"}],
  )
  return tmp_path


@pytest.mark.all
def test_the_real_command_on_local_tasks(workdir, tasks, capsys):
  out = tasks / "out"
  status = main([
    "harness", "run", "--model", "dllm_jax", "--model_args",
    f"workdir={workdir},protocol=llada,mc_num=4,length=32",
    "--tasks", "toy_choice,toy_rolling,toy_generation",
    "--include_path", str(tasks), "--batch_size", "4",
    "--output_path", str(out), "--log_samples",
  ])  # fmt: skip
  said, errors = capsys.readouterr()
  assert status == 0, errors
  assert "toy_choice" in said
  (info,) = json.loads(said.splitlines()[-1])["models"]
  assert info["protocol"]["mc_num"] == 4 and info["forward_tokens"] > 0
  results = json.loads(next(out.rglob("results*.json")).read_text())
  figures = results["results"]
  assert 0 <= figures["toy_choice"]["acc,none"] <= 1
  assert figures["toy_rolling"]["bits_per_byte,none"] > 0
  assert figures["toy_generation"]["exact_match,none"] == 0
  assert results["config"]["protocol"]["estimator"] == "counts"

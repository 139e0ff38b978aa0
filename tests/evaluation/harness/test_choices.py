"""Multiple choice by constrained decoding, beside likelihoods of one token."""

import json
import os

import pytest

# Read once, when the harness's libraries are imported.
os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.model import CachingLM  # noqa: E402

from dllm_jax.cli.main import main  # noqa: E402
from dllm_jax.evaluation.harness.model import DiffusionLM  # noqa: E402
from tests import runs  # noqa: E402
from tests.serving import servers  # noqa: E402

LETTERS = [
  ("To be or", ["abcd", "xyz"]),
  ("KING", ["zQe", "tEk"]),
  ("a", ["qrst", "no"]),
]
SINGLE = [(context, list(some)) for context, both in LETTERS for some in both]
WORDS = [
  ("Is it? ", ["yes sir", "no", "not at all"]),
  ("To be or", [" not", " yes sir", " x"]),
  ("", ["a", "bc"]),
]


@pytest.fixture(scope="session")
def ending(tmp_path_factory):
  """A run whose tokens are bytes and an end of text."""
  folder = tmp_path_factory.mktemp("letters")
  (folder / "tokenizer.json").write_text(servers.letters().definition)
  names = {"eos_token": "<eos>", "mask_token": "[MASK]"}
  (folder / "tokenizer_config.json").write_text(json.dumps(names))
  workdir = folder / "run"
  fields = {"data__tokenizer": str(folder), "training__steps": 2}
  runs.run(workdir, **fields).train()
  return workdir


def ask(documents, **fields):
  """The harness's requests: one for each choice of each document."""
  return [
    Instance(
      request_type="loglikelihood",
      doc={},
      arguments=(context, choice),
      idx=i,
      metadata=("task", number, 1),
      **fields,
    )
    for number, (context, choices) in enumerate(documents)
    for i, choice in enumerate(choices)
  ]


def chosen(found, documents):
  """The number of the one choice of each document that was written."""
  found, numbers = iter(found), []
  for _, choices in documents:
    part = [next(found) for _ in choices]
    (one,) = (i for i, (value, _) in enumerate(part) if value == 0.0)
    assert [best for _, best in part] == [i == one for i in range(len(part))]
    numbers.append(one)
  return numbers


@pytest.mark.all
def test_a_letter_is_chosen_as_by_its_likelihood(workdir):
  """Both are what one network call says of one slot."""
  made = DiffusionLM(str(workdir), protocol="constrained", batch_size=4)
  written = made.loglikelihood(ask(SINGLE), disable_tqdm=True)
  exact = DiffusionLM(str(workdir), estimator="left", batch_size=4)
  values = exact.loglikelihood(ask(SINGLE), disable_tqdm=True)
  values, best = iter(value for value, _ in values), []
  for _, choices in SINGLE:
    part = [next(values) for _ in choices]
    best.append(part.index(max(part)))
  assert chosen(written, SINGLE) == best and len(set(best)) > 1


@pytest.mark.all
def test_choices_of_any_length_are_written_whole(ending):
  """White space at a context's end is theirs; no answer asks who else is there."""
  make = lambda size: DiffusionLM(
    str(ending), protocol="constrained", batch_size=size
  )
  together = make(4).loglikelihood(ask(WORDS), disable_tqdm=True)
  alone = [
    chosen(make(1).loglikelihood(ask([one]), disable_tqdm=True), [one])[0]
    for one in WORDS
  ]
  assert chosen(together, WORDS) == alone


def test_what_is_no_choice_is_told(workdir, tmp_path):
  made = DiffusionLM(str(workdir), protocol="constrained", batch_size=4)
  for documents, said in (
    ([("A", ["b"])], "has only one"),
    ([("A", ["b", "b"])], "has only one"),
    ([("A", ["b", ""])], "several lengths"),
    ([("A", ["b", "cd"])], "end of text"),
    ([("A", ["b" * 40, "c" * 40])], "does not fit the canvas of 32"),
  ):
    with pytest.raises(ValueError, match=said):
      made.loglikelihood(ask(documents), disable_tqdm=True)
  twice = ask([("A", ["b", "c"])]) + ask([("", ["b", "c"])])
  with pytest.raises(ValueError, match="acc_mutual_info"):
    made.loglikelihood(twice, disable_tqdm=True)
  cache = CachingLM(made, str(tmp_path / "cache.db"))
  with pytest.raises(ValueError, match="leave out --use_cache"):
    cache.loglikelihood(ask(SINGLE))
  with pytest.raises(ValueError, match="likelihood, constrained, not 'best'"):
    DiffusionLM(str(workdir), multiple_choice="best")


@pytest.mark.all
def test_the_real_command_on_a_local_task(ending, tmp_path, capsys):
  rows = [{"q": q, "c": c, "a": 0} for q, c in WORDS[:2]]
  rows += [{"q": "Hm", "c": c, "a": 0} for c in (["a", "b"], ["b", "a"])]
  data = tmp_path / "data.jsonl"
  data.write_text("\n".join(map(json.dumps, rows)))
  task = {
    "task": "toy",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(data)}},
    "test_split": "test",
    "metadata": {"version": 1},
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}}",
    "doc_to_choice": "{{c}}",
    "doc_to_target": "{{a}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
  }
  (tmp_path / "toy.yaml").write_text(json.dumps(task))  # JSON is YAML
  out = tmp_path / "out"
  status = main([
    "harness", "run", "--model", "dllm_jax", "--model_args",
    f"workdir={ending},protocol=constrained,length=32",
    "--tasks", "toy", "--include_path", str(tmp_path),
    "--output_path", str(out), "--log_samples",
  ])  # fmt: skip
  assert status == 0, capsys.readouterr().err
  results = json.loads(next(out.rglob("results*.json")).read_text())
  assert results["config"]["protocol"]["multiple_choice"] == "constrained"
  figures = results["results"]["toy"]
  documents = [(row["q"], row["c"]) for row in rows]
  made = DiffusionLM(str(ending), protocol="constrained")
  found = chosen(made.loglikelihood(ask(documents)), documents)
  assert figures["acc,none"] == found.count(0) / 4 == figures["acc_norm,none"]
  assert found[2] != found[3]  # one choice, wherever it stands

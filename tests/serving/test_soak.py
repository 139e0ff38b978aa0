"""Long runs of a whole server: a soak, and lm-evaluation-harness as a client."""

import json
import os

import pytest

from tests.serving import servers, soak

pytestmark = pytest.mark.all


def test_a_minute_of_clients_that_misbehave():
  result = soak.soak(minutes=1.0, clients=50)
  assert not result["wrong"], result
  assert result["answers_as_offline"] > 50


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return soak.prepared(tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def trained(run):
  running = servers.Running(run).start()
  yield running
  running.stop()


def written(run, chat: bool, prompts: list[str]) -> list[str]:
  """Returns what the best tokens after prompts are, offline."""
  found = []
  for prompt in prompts:
    turns = [{"role": "user", "content": prompt}]
    ids = (
      run.tokenizer.chat(turns) if chat else run.tokenizer.prompt(prompt)
    ).tolist()
    (row,) = run.sample_rows(
      [[*ids, *[None] * 8]],
      length=servers.LENGTH,
      sampler=servers.SAMPLER,
      options=[servers.RowOptions(temperature=0.0)],
    ).rows
    found.append(run.tokenizer.decode(row[len(ids) :]).partition("\n")[0])
  return found


def evaluated(folder, docs, model, *, chat=False, task, **args):
  """Returns what lm-evaluation-harness finds on a task of some documents."""
  os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
  import lm_eval
  from lm_eval.models import openai_completions  # noqa: F401  registers both
  from lm_eval.tasks import TaskManager

  file = folder / "docs.jsonl"
  file.write_text("\n".join(map(json.dumps, docs)) + "\n")
  whole = {
    "task": "toy",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(file)}},
    "test_split": "test",
    "doc_to_text": "{{q}}",
  }
  (folder / "toy.yaml").write_text(json.dumps(whole | task))
  return lm_eval.simple_evaluate(
    model=model,
    tasks=["toy"],
    task_manager=TaskManager(include_path=str(folder), include_defaults=False),
    apply_chat_template=chat,
    bootstrap_iters=0,
    **args,
  )


@pytest.mark.parametrize("batch", [1, 4])
def test_the_harness_finds_the_same_likelihoods(trained, run, tmp_path, batch):
  from dllm_jax.evaluation.harness.model import DiffusionLM

  docs = [
    {"q": "ROMEO:", "a": ["\nO, she doth", " xq", "\nWhat"], "right": 0},
    {"q": "To be, or", "a": [" not", " zzzz"], "right": 0},
  ]
  task = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{a}}",
    "doc_to_target": "right",
    "metric_list": [{"metric": "acc"}],
  }
  args = {
    "model": servers.NAME,
    "base_url": f"{trained.url}/v1/completions",
    "tokenizer_backend": "remote",
    "batch_size": batch,
  }
  own = DiffusionLM(str(run.workdir), estimator="left", batch_size=4)
  inside = evaluated(tmp_path, docs, own, task=task)
  outside = evaluated(
    tmp_path, docs, "local-completions", task=task, model_args=args
  )
  said = [
    [
      nats
      for sample in found["samples"]["toy"]
      for ((nats, _),) in sample["resps"]
    ]
    for found in (inside, outside)
  ]
  assert said[1] == pytest.approx(said[0], abs=1e-4) and len(said[0]) == 5
  figures = [f["results"]["toy"]["acc,none"] for f in (inside, outside)]
  assert figures[0] == figures[1]


@pytest.mark.parametrize("chat", [False, True])
def test_the_harness_finds_the_same_figures(trained, run, tmp_path, chat):
  from dllm_jax.evaluation.harness.model import DiffusionLM

  prompts = ["ROMEO:", "A", "To be", "Enter"]
  answers = written(run, chat, prompts)
  docs = [
    {"q": prompt, "a": answer if i % 2 else "never that"}
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
  ]
  task = {
    "output_type": "generate_until",
    "doc_to_target": "{{a}}",
    "generation_kwargs": {
      "until": ["\n"],
      "max_gen_toks": 8,
      "do_sample": False,
    },
    "metric_list": [{"metric": "exact_match"}],
  }
  own = DiffusionLM(
    str(run.workdir), sampler="llada", block_length=8, batch_size=4
  )
  route = "chat/completions" if chat else "completions"
  args = {
    "model": servers.NAME,
    "base_url": f"{trained.url}/v1/{route}",
    "tokenizer_backend": None,
    "num_concurrent": 3,
  }
  told = {"task": task, "chat": chat}
  inside = evaluated(tmp_path, docs, own, **told)
  outside = evaluated(
    tmp_path,
    docs,
    "local-chat-completions" if chat else "local-completions",
    model_args=args,
    **told,
  )
  said = [
    [sample["resps"] for sample in found["samples"]["toy"]]
    for found in (inside, outside)
  ]
  assert said[0] == said[1]
  figures = [
    found["results"]["toy"]["exact_match,none"] for found in (inside, outside)
  ]
  assert figures[0] == figures[1] > 0

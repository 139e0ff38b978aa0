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


@pytest.mark.parametrize("chat", [False, True])
def test_the_harness_finds_the_same_figures(trained, run, tmp_path, chat):
  os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
  import lm_eval
  from lm_eval.models import openai_completions  # noqa: F401  registers both
  from lm_eval.tasks import TaskManager

  from dllm_jax.evaluation.harness.model import DiffusionLM

  prompts = ["ROMEO:", "A", "To be", "Enter"]
  answers = written(run, chat, prompts)
  docs = [
    {"q": prompt, "a": answer if i % 2 else "never that"}
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
  ]
  (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)) + "\n")
  task = {
    "task": "toy",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{q}}",
    "doc_to_target": "{{a}}",
    "generation_kwargs": {
      "until": ["\n"],
      "max_gen_toks": 8,
      "do_sample": False,
    },
    "metric_list": [{"metric": "exact_match"}],
  }
  (tmp_path / "toy.yaml").write_text(json.dumps(task))

  def evaluated(model, **args):
    return lm_eval.simple_evaluate(
      model=model,
      tasks=["toy"],
      task_manager=TaskManager(
        include_path=str(tmp_path), include_defaults=False
      ),
      apply_chat_template=chat,
      bootstrap_iters=0,
      **args,
    )

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
  inside = evaluated(own)
  outside = evaluated(
    "local-chat-completions" if chat else "local-completions", model_args=args
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

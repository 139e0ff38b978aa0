"""Runs that train on conversations: what is said, kept, evaluated and asked."""

import io
import json
import types

import numpy as np
import pytest

from dllm_jax.cli.main import main
from dllm_jax.config import config as configs
from dllm_jax.core import paths
from dllm_jax.objectives.texts import Fill
from dllm_jax.run import samples, workdir
from dllm_jax.training import held_out
from tests import golden_cases
from tests.data import chats
from tests.data.chats import END, EOS, said
from tests.pretrained import golden


def _talks(path, number=40):
  rows = [
    {"messages": said(f"w{i + 6}", f"w{i + 7} w8")} for i in range(number)
  ]
  return chats.write(path, rows)


def _imported(folder, path, **fields):
  """Lays out the files of a run that was imported, its parameters apart."""
  folder.mkdir()
  made = chats.tokenizer(folder / "tokenizer", None)
  (folder / "tokenizer.json").write_text(made.to_json())
  resolved = configs.resolve({"objective": {"name": "llada"}})
  (folder / "config.json").write_text(resolved.to_json())
  (folder / "checkpoints" / "0").mkdir(parents=True)
  data = {"path": path, "length": 16} | fields
  given = {"objective": {"name": "llada"}, "data": data}
  return paths.place(folder), configs.resolve(given)


def test_a_run_keeps_the_template_and_fills_as_its_objective_says(tmp_path):
  path = _talks(tmp_path / "a.jsonl")
  file = tmp_path / "chat.jinja"
  file.write_text(chats.TEMPLATE)
  folder, resolved = _imported(tmp_path / "run", path, template=str(file))
  corpus = workdir.load_corpus(folder, resolved)
  assert corpus.train[0].tokens[-2:].tolist() == [EOS, EOS]
  assert corpus.train[0].mask[-1]
  assert configs.parse(resolved).fill == Fill("counted")
  workdir.begin(folder, resolved, corpus.tokenizer)
  file.unlink()  # The run goes on without it.
  kept = workdir.read_tokenizer(folder)
  assert kept.chat_template == chats.TEMPLATE and END in kept.end_ids
  again = workdir.load_corpus(folder, resolved)
  assert again.tokenizer == kept
  assert len(again.train) == len(corpus.train)


def test_preferences_are_for_another_command(tmp_path):
  rows = [
    {"prompt": f"w{i + 6}", "chosen": "w7 w8", "rejected": "w9"}
    for i in range(40)
  ]
  path = chats.write(tmp_path / "a.jsonl", rows)
  file = tmp_path / "chat.jinja"
  file.write_text(chats.TEMPLATE)
  folder, resolved = _imported(tmp_path / "run", path, template=str(file))
  with pytest.raises(ValueError, match="holds preferences .*dllm align"):
    workdir.load_corpus(folder, resolved)
  resolved.data.format = "preferences"  # Asked for: the chosen answers.
  assert len(workdir.load_corpus(folder, resolved).train) > 20


def test_bounds_are_by_tokens_of_answers():
  figures = {
    "bits_per_token": 1.5,
    "bits_per_char": 0.5,
    "perplexity": 2**1.5,
    "standard_error": 0.1,
    "tokens": 40,
    "passes": 2,
  }
  assert held_out._of_text(figures, 1.0) is figures
  found = held_out._of_text(figures, 0.25)
  assert found["bits_per_token"] == 6.0 and found["bits_per_char"] == 2.0
  assert found["perplexity"] == 64.0 and found["tokens"] == 10
  assert found["standard_error"] == 0.4 and found["passes"] == 2


def test_the_log_has_answers_to_prompts(tmp_path):
  tokenizer = chats.tokenizer(tmp_path)
  asked = (((61, 62, 7, 65, 61, 63), 4), ((61, 62, 9, 65, 61, 63), 4))

  def sample_rows(rows, *, state):
    assert state == "state" and [row.count(None) for row in rows] == [4, 4]
    found = [[*ids, ids[2] + 1, EOS, 5, 5] for ids, _ in asked]
    return types.SimpleNamespace(rows=found)

  run = types.SimpleNamespace(
    corpus=types.SimpleNamespace(prompts=asked),
    tokenizer=tokenizer,
    sample_rows=sample_rows,
  )
  assert samples.shown(run, "state") == ["w7\n-> w8", "w9\n-> w10"]
  run.corpus.prompts = ()
  run.sample = lambda *, state: types.SimpleNamespace(texts=["a"])
  assert samples.shown(run, "state") == ["a"]


@pytest.mark.all
@pytest.mark.parametrize("packing", ["slices", "packed"])
def test_an_import_is_tuned_by_one_command(
  packing, tmp_path, capsys, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  config = golden_cases.load("sft").config["hf_config"]
  words = config["vocab_size"] - len(chats.SPECIAL) - 1
  ids = {"mask_token_id": words + 6, "eos_token_id": words + 5}
  ids["pad_token_id"] = ids["eos_token_id"]
  published = golden.publish("sft", tmp_path / "published", **ids)
  chats.tokenizer(published, None, words=words)
  assert main(["convert", f"--from_hf={published}", "--workdir=run"]) == 0
  _talks(tmp_path / "a.jsonl")
  (tmp_path / "chat.jinja").write_text(chats.TEMPLATE)
  train = [
    "train",
    "--workdir=run",
    "--config.data.path=a.jsonl",
    "--config.data.length=32",
    f"--config.data.packing={packing}",
    "--config.training.steps=4",
    "--config.training.batch_size=8",
    "--config.evaluation.batch_size=8",
    "--config.evaluation.sample_every=2",
    "--config.sampler.steps=2",
    "--config.logging.every_steps=1",
    "--config.optimizer.schedule=constant",
    "--config.optimizer.learning_rate=0.01",
  ]
  assert main(train) == 2
  assert "config.data.template=FILE" in capsys.readouterr().err
  assert main([*train, "--config.data.template=chat.jinja"]) == 0
  out = capsys.readouterr().out
  assert "a.jsonl: 40 rows of messages (messages), " in out
  assert "<assistant>>>w" in out
  lines = [json.loads(s) for s in (tmp_path / "run/metrics.jsonl").open()]
  answers = [line["sample"] for line in lines if "sample" in line]
  assert len(answers) == 2 and answers[0].count("\n-> ") >= 1
  losses = [s["loss_nats_per_token"] for s in lines if "corrupted" in s]
  assert len(losses) == 4 and losses[-1] < losses[0]
  assert np.isfinite(json.loads(out.splitlines()[-1])["eval_bits_per_char"])
  (tmp_path / "chat.jinja").unlink()
  assert main(["train", "--workdir=run", "--config.training.steps=5"]) == 0
  monkeypatch.setattr("sys.stdin", io.StringIO("w7\n"))
  chat = ["chat", "--workdir=run", "--new_tokens=8", "--sampler.steps=2"]
  assert main(chat) == 0

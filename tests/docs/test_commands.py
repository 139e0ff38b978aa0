"""The pages' commands run, as they are typed, in a folder with a space in its name.

What they name is there, tiny: the demo's run, a published folder of LLaDA's, texts
and conversations. Training is cut to two steps, evaluation to a batch. What does
not run here says where it does.
"""

import io
import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from dllm_jax.cli.main import main
from dllm_jax.objectives import TokenSpace
from tests import golden_cases
from tests.data import chats
from tests.docs import blocks
from tests.pretrained import golden

pytestmark = pytest.mark.all

SHORT = {
  "train": (
    "--config.training.steps=2",
    "--config.training.batch_size=8",
    "--config.evaluation.every_steps=0",
    "--config.evaluation.batch_size=8",
    "--config.evaluation.sample_every=0",
    "--config.logging.progress=false",
  ),
  "evaluate": ("--batches=1",),
}
# Commands with one of these words run elsewhere.
ELSEWHERE = {
  "serve": "tests/serving, as a process",
  "plan": "tests/planning",
  "harness": "tests/evaluation/harness",
  "benchmark": "tests/reports: it measures for minutes",
  "--task=": "tests/evaluation/tasks: they train for minutes",
  "runs/shakespeare": "make demo is its like",
  "runs/instructions": "tests/evaluation/tasks, which train it",
  "runs/gemma": "tests/sampling/test_parity_gemma.py",
  "runs/bd3lm": "tests/evaluation/test_estimators.py",
  "runs/one,runs/two": "tests/reports",
}
PAGES = (
  "adapters.md",
  "evaluation.md",
  "finetuning.md",
  "pretrained.md",
  "pretraining.md",
  "sampling.md",
  "start.md",
)


def here(words: list[str]) -> bool:
  """Whether a command is run by this file."""
  known = lambda part: part in words or any(part in w for w in words[2:])
  return words[0] == "dllm" and not any(map(known, ELSEWHERE))


def commands(page: str) -> list[list[str]]:
  """Returns a page's commands that run here."""
  shell = [b for b in blocks.blocks("sh") if b.page.name == page and not b.why]
  found = [words for b in shell for words in blocks.commands(b.text)]
  return [words for words in found if here(words)]


def _published(folder):
  """Writes a published folder of a network of some thousand parameters."""
  config = golden_cases.load("sft").config["hf_config"]
  words = config["vocab_size"] - len(chats.SPECIAL) - 1
  ids = {"mask_token_id": words + 6, "eos_token_id": words + 5}
  ids["pad_token_id"] = ids["eos_token_id"]
  golden.publish("sft", folder, **ids)
  chats.tokenizer(folder, words=words)


@pytest.fixture(scope="module")
def things(tmp_path_factory):
  """Returns a folder with what the pages speak of."""
  folder = tmp_path_factory.mktemp("pages") / "a desk"
  folder.mkdir()
  text = "First Citizen:\nBefore we proceed, hear me speak.\n\n" * 80
  for name in ("my_text.txt", "mine.txt", "wiki.txt"):
    (folder / name).write_text(text)
  (folder / "corpus").mkdir()
  rows = [json.dumps({"text": text[:400]})] * 20
  (folder / "corpus" / "a.jsonl").write_text("\n".join(rows))
  (folder / "prompts.txt").write_text("ROMEO:\nJULIET:\n")
  answer = {"prompt": "ROMEO:", "answer": " I say"}
  (folder / "answers.jsonl").write_text(json.dumps(answer))
  talks = [
    {"messages": chats.said(f"w{i + 6}", f"w{i + 7} w8")} for i in range(40)
  ]
  chats.write(folder / "chats.jsonl", talks)
  pairs = [
    {"prompt": f"w{i + 6}", "chosen": f"w{i + 7}", "rejected": f"w{i + 20}"}
    for i in range(10)
  ]
  chats.write(folder / "pairs.jsonl", pairs)
  _published(folder / "LLaDA-8B-Instruct")
  (folder / "configs").symlink_to(blocks.ROOT / "configs")
  demo = ["train", "--config=demo:smoke", f"--workdir={folder}/runs/demo"]
  demo.append("--config.data.length=128")  # as the demo's own
  assert main([*demo, *SHORT["train"]]) == 0
  return folder


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_run(page, things, tmp_path, monkeypatch, capsys):
  desk = tmp_path / "a desk"
  shutil.copytree(things, desk, symlinks=True)
  monkeypatch.chdir(desk)
  typed = commands(page)
  assert typed
  for words in typed:
    monkeypatch.setattr("sys.stdin", io.StringIO("w7\n"))
    status = main([*words[1:], *SHORT.get(words[1], ())])
    said = capsys.readouterr()
    assert status == 0, (" ".join(words), said.err)
    if words[1] != "configs":
      json.loads(said.out.splitlines()[-1])


# What a page's Python takes as there already.
GIVEN = {
  "finetuning.md": """
from dllm_jax.cli.main import main
from dllm_jax import Run
main(["convert", "--from_hf=LLaDA-8B-Instruct", "--workdir=runs/tuned"])
run = Run.open("runs/tuned")
""",
  "pretrained.md": """
import jax, numpy as np
from dllm_jax.parallel import make_mesh
mesh = make_mesh({"data": -1})
tokens = np.arange(8)[None].repeat(jax.device_count(), 0)
attention_mask = np.ones(tokens.shape, bool)
tuned = None
""",
  "sampling.md": "",
}


@pytest.mark.parametrize("page", sorted(GIVEN))
def test_python_of_a_page_runs(page, things, tmp_path, monkeypatch):
  desk = tmp_path / "a desk"
  shutil.copytree(things, desk, symlinks=True)
  monkeypatch.chdir(desk)
  python = [b.text for b in blocks.blocks("python") if b.page.name == page]
  assert python
  names = {}
  for text in (GIVEN[page], *python):
    exec(text, names)


def test_the_objective_of_the_guide_masks_runs():
  python = [b for b in blocks.blocks("python") if b.page.name == "objective.md"]
  names = {}
  for block in python:
    exec(block.text, names)
  assert names["get_config"]().objective.name == "spans"
  space = TokenSpace(vocab_size=9, mask_id=8, length=32)
  spans = names["Spans"].over(space)
  x0 = jnp.zeros((64, 32), jnp.int32)
  t = jnp.full((64, 1), 0.5)
  z = spans.corrupt(spans.init(jax.random.key(0)), jax.random.key(1), x0, t)
  masked = (z == 8).reshape(64, 8, 4)
  assert (masked.all(-1) == masked.any(-1)).all()
  assert 0.3 < masked.mean() < 0.7


def test_a_command_that_runs_nowhere_is_found():
  assert here(["dllm", "sample", "--workdir=runs/demo"])
  assert not here(["dllm", "serve", "--workdir=runs/demo"])
  assert not here(["make", "demo"])

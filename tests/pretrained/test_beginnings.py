"""What a published model's rows begin and end with: as its owners mean it."""

import io
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

import dllm_jax
from dllm_jax.cli.main import main
from dllm_jax.run.run import Run
from tests import golden_cases
from tests.data.test_chat import folder as words
from tests.data.test_chat import TALK, TEMPLATE
from tests.pretrained.golden import publish, published_config

WORDS = ["a", "b", "c", "<unk>"]
QWEN = {
  "model_type": "qwen2", "architectures": ..., "mask_token_id": ...,
}  # fmt: skip


def dllm(capsys, *argv):
  """Runs a command; returns the last line's object."""
  assert main(list(argv)) == 0, capsys.readouterr().err
  return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
  """A Qwen whose config names a beginning that its tokenizer does not write."""
  root = tmp_path_factory.mktemp("qwen")
  source = publish(
    "dream_logits",
    root / "in",
    **QWEN,
    bos_token_id=4,
    eos_token_id=4,
    pad_token_id=4,
  )
  made = tokenizers.Tokenizer(
    models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>")
  )
  made.pre_tokenizer = pre_tokenizers.Whitespace()
  made.add_special_tokens(["<|endoftext|>"])
  made.save(str(source / "tokenizer.json"))
  config = {"bos_token": None, "eos_token": "<|endoftext|>"}
  config["add_bos_token"] = False
  (source / "tokenizer_config.json").write_text(json.dumps(config))
  argv = [f"--from_hf={source}", f"--workdir={root / 'run'}"]
  assert main(["convert", *argv]) == 0
  return source, root / "run"


def log_probabilities(model, ids):
  """Returns log p of all tokens but the mask, which no text has."""
  logits = model.logits(jnp.asarray([ids]))[0]
  return jax.nn.log_softmax(logits.at[:, model.ids.mask].set(-jnp.inf))


# olafurjohannsson/kjarni issue 50: an engine put <|endoftext|> before every
# prompt of Qwen2.5, because its config.json has a bos_token_id.
@pytest.mark.all
def test_a_prompt_has_nothing_before_it(qwen, capsys):
  source, workdir = qwen
  run = Run.open(workdir)
  assert run.generator.templates(["a b c"], new_tokens=1) == [[0, 1, 2, None]]
  model = dllm_jax.load_pretrained(source)
  assert (model.tokenizer.begin_ids, model.tokenizer.end_ids) == ((), (4,))
  ids = [0, 1, 2]
  for _ in range(6):
    logits = model.logits(jnp.asarray([ids]))[0, -1, :3]
    ids.append(int(np.argmax(logits)))
  found = dllm(
      capsys, "sample", f"--workdir={workdir}", "--prompt=a b c",
      "--new_tokens=6", "--sampler.temperature=0", "--sampler.forced=0,1,2",
  )  # fmt: skip
  assert found["samples"] == [" ".join(WORDS[i] for i in ids)]


@pytest.mark.all
def test_likelihoods_have_nothing_before_a_context(qwen, capsys, tmp_path):
  source, workdir = qwen
  model = dllm_jax.load_pretrained(source)
  log_p = log_probabilities(model, [0, 1, 2, 0, 1])
  expected = float(log_p[2, 0] + log_p[3, 1])
  pairs = tmp_path / "pairs.jsonl"
  pairs.write_text(json.dumps({"prompt": "a b c", "answer": " a b"}))
  found = dllm(capsys, "evaluate", f"--workdir={workdir}", f"--pairs={pairs}")
  np.testing.assert_allclose(found["log_likelihoods"], expected, rtol=1e-4)
  pytest.importorskip("lm_eval")
  from dllm_jax.evaluation.harness.model import DiffusionLM

  harness = DiffusionLM(str(workdir))
  request = types.SimpleNamespace(args=("a b c", " a b"))
  ((value, _),) = harness.loglikelihood([request], disable_tqdm=True)
  np.testing.assert_allclose(value, expected, rtol=1e-4)


@pytest.mark.all
def test_a_text_without_context_begins_after_what_ends_one(qwen):
  """The first token of a text stands where another text has ended."""
  source, workdir = qwen
  model = dllm_jax.load_pretrained(source)
  log_p = log_probabilities(model, [4, 0, 1])
  expected = float(log_p[0, 0] + log_p[1, 1])
  from dllm_jax.evaluation.likelihood.scorer import Item, Scorer

  scorer = Scorer.of(Run.open(workdir))
  (nats,) = scorer.score(
    [Item(tokens=(0, 1))], samples=1, key=jax.random.key(0), rows=8
  )
  np.testing.assert_allclose(-nats, expected, rtol=1e-4)


@pytest.mark.parametrize(
  ("tokenizer", "begin"),
  [({}, []), ({"add_bos_token": False}, []), ({"add_bos_token": True}, [3])],
  ids=str,
)
def test_a_beginning_that_is_asked_for_is_there_once(
  tokenizer, begin, tmp_path
):
  source = publish("dream_logits", tmp_path / "in", **QWEN, eos_token_id=6)
  words(source, mask_token=None, **tokenizer)
  model = dllm_jax.load_pretrained(source)
  assert model.tokenizer.prompt("a b").tolist() == [*begin, 0, 1]
  assert model.objective.bos_id == 3 and not model.objective.begins


# Chat models end a turn with another token than a text: all of them end a row.
@pytest.mark.parametrize(
  ("config", "generation", "template", "expected"),
  [
    (6, None, None, (6,)),
    ([3, 6], None, None, (3, 6)),
    (3, {"eos_token_id": [6, 5]}, None, (3, 6, 5)),
    (3, {"eos_token_id": 5}, TEMPLATE, (3, 5, 6)),
    (3, None, TEMPLATE, (3, 6)),
  ],
  ids=str,
)
def test_a_row_ends_with_any_of_its_ends(
  config, generation, template, expected, tmp_path
):
  source = publish(
    "llada_logits", tmp_path / "in", mask_token_id=7, eos_token_id=config
  )
  words(source, **({"chat_template": template} if template else {}))
  if generation:
    path = source / "generation_config.json"
    path.write_text(json.dumps(generation))
  model = dllm_jax.load_pretrained(source)
  assert model.tokenizer.end_ids == expected
  assert model.tokenizer.eos_id == expected[0]


def test_an_end_that_is_no_token_is_named(tmp_path):
  source = publish("llada_logits", tmp_path / "in")
  (source / "generation_config.json").write_text('{"eos_token_id": 99999}')
  with pytest.raises(ValueError, match="generation_config.json.*lacks the end"):
    dllm_jax.load_pretrained(source)


# huggingface/trl pull request 3299: templates have the tokenizer's own tokens.
def test_templates_know_the_tokenizers_ends(tmp_path):
  template = (
    "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
  )
  source = publish(
    "llada_logits", tmp_path / "in", mask_token_id=7, eos_token_id=[3, 6]
  )
  words(source, eos_token="<|end|>", chat_template=template)
  text = dllm_jax.load_pretrained(source).tokenizer.render(TALK)
  assert text == "a b<|end|>b<|end|>"


# abetlen/llama-cpp-python issue 1561: a template that writes the beginning.
@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.all
def test_a_chat_loses_no_token(begins, tmp_path, capsys, monkeypatch):
  source = publish(
    "dream_logits", tmp_path / "in", **QWEN, bos_token_id=3, eos_token_id=6,
    pad_token_id=6,
  )  # fmt: skip
  template = TEMPLATE if begins else TEMPLATE.removeprefix("{{ bos_token }}")
  words(source, mask_token=None, chat_template=template)
  workdir = tmp_path / "run"
  dllm(capsys, "convert", f"--from_hf={source}", f"--workdir={workdir}")
  monkeypatch.setattr("sys.stdin", io.StringIO("b\n"))
  found = dllm(
      capsys, "chat", f"--workdir={workdir}", "--new_tokens=6",
      "--sampler.forced=0",
  )  # fmt: skip
  assert found["answers"] == ["a a a a a a"]


def test_a_run_that_began_with_a_token_still_does(tmp_path):
  config = published_config(golden_cases.load("dream_logits"))
  source = publish("dream_logits", tmp_path / "in", **QWEN, begins=True)
  objective = dllm_jax.load_pretrained(source).objective
  assert objective.begins and objective.begin_id == objective.mask_id
  assert config["eos_token_id"] == objective.eos_id

"""The model of lm-evaluation-harness: its class, and the real command."""

import json
import os
import types

import jax
import numpy as np
import pytest
import tokenizers

# Read once, when the harness's libraries are imported.
os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}

pytest.importorskip("lm_eval")

from lm_eval.api.model import CachingLM  # noqa: E402

from dllm_jax.cli.main import main  # noqa: E402
from dllm_jax.data.huggingface import huggingface  # noqa: E402
from dllm_jax.evaluation.harness import protocols  # noqa: E402
from dllm_jax.evaluation.harness.model import DiffusionLM  # noqa: E402
from dllm_jax.evaluation.likelihood import contexts, documents
from dllm_jax.evaluation.likelihood.scorer import Item, Scorer  # noqa: E402
from tests.data.test_chat import folder as tokenizer_folder  # noqa: E402
from tests.data.test_chat import TALK, TEMPLATE  # noqa: E402


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
  first, second = documents.windows(ids, length=32)
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
  # An empty continuation is certain, and no end of all other requests.
  assert model.loglikelihood(ask(("a", ""))) == [(0.0, True)]
  with pytest.raises(ValueError, match="does not fit the canvas"):
    model.loglikelihood(ask(("a", "b" * 40)))


def test_protocols_are_published_settings():
  llada = protocols.named("llada", {"mc_num": 32, "block_length": 4})
  assert llada.estimator == "counts" and llada.mc_num == 32
  assert dict(llada.fields) == {"temperature": 0.0, "block_length": 4}
  likelihoods = {
    name: (p.estimator, p.mc_num, p.strata, p.begin, p.end)
    for name, p in protocols.PROTOCOLS.items()
  }
  assert likelihoods["llada"] == ("counts", 128, 8, False, False)
  assert likelihoods["llada_single"] == ("counts", 1, 1, False, False)
  assert likelihoods["dream"] == ("times", 128, 32, True, True)
  answers = {
    name: (p.fixed, p.max_gen_toks, dict(p.fields))
    for name, p in protocols.PROTOCOLS.items()
  }
  cold, warm = ({"temperature": t, "top_p": 0.95} for t in (0.0, 0.2))
  assert answers["llada"] == (True, 1024, {"temperature": 0.0})
  assert answers["llada_blocks"][2]["block_length"] == 8
  assert answers["dream"] == (True, 256, cold)
  assert answers["dream_code"] == (True, 512, warm)
  with pytest.raises(ValueError, match="legal: default, llada"):
    protocols.named("gpt", {})
  with pytest.raises(ValueError, match="unknown --model_args speed; legal"):
    protocols.named("llada", {"speed": 9})
  with pytest.raises(ValueError, match="multiple of strata=8"):
    protocols.named("llada", {"mc_num": 42})


def test_what_stands_around_an_answer(model, monkeypatch):
  tokenizer = types.SimpleNamespace(bos_id=7, eos_id=8, end_ids=(8,))
  assert contexts.special(tokenizer, "begin", True) == [7]
  assert contexts.special(tokenizer, "end", True) == [8]
  assert contexts.special(tokenizer, "end", False) == []
  assert contexts.fitting([7], [1, 2, 3], 4) == [7, 1, 2, 3]
  monkeypatch.setattr(contexts, "_said", set())
  with pytest.warns(UserWarning, match="cut from the left"):
    assert contexts.fitting([7], [1, 2, 3], 2) == [7, 3]
  assert contexts.fitting([7], [1, 2, 3], 0) == []
  assert contexts.cut("one\n\ntwo", ["\n\n", "w"]) == "one"
  # Dream scores what stands between the tokens that begin and end a text.
  dream = protocols.named("dream", {"max_gen_toks": 4})
  monkeypatch.setattr(model, "protocol", dream)
  monkeypatch.setattr(
    contexts, "special", lambda _, role, on: [3 if role == "begin" else 4] * on
  )
  item = model._pair("To", " be")
  assert item.tokens[0] == 3 and item.tokens[-1] == 4
  assert (item.given, item.after, item.targets) == (3, 1, 3)
  # Its answers have its own length, whatever a task says.
  row, _, config = model._asked("To", {"max_gen_toks": 9, "temperature": 1.0})
  assert row.count(None) == 4 and row[0] == 3
  assert config.temperature == model._sampler.temperature


def test_conversations(model, tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="leave out --apply_chat_template"):
    model.apply_chat_template(TALK[:1])
  tokenizer = huggingface(tokenizer_folder(tmp_path, chat_template=TEMPLATE))
  monkeypatch.setattr(model._run, "tokenizer", tokenizer)
  monkeypatch.setattr(model, "_rendered", False)
  text = model.apply_chat_template(TALK[:1])
  assert text == "<s><|user|>a b<|end|><|assistant|>"
  assert model._encode(text) == tokenizer.chat(TALK[:1]).tolist()
  # In what follows the context the names of special tokens are tokens, too.
  assert model._encode(text + "b")[-2:] == [5, 1]
  assert model.chat_template(True) == TEMPLATE
  assert model._context(tokenizer.encode(text), 99)[:2] == [3, 4]
  # gen_prefix: the turn stays open (lm-evaluation-harness 0.4.13 asks
  # transformers for continue_final_message), white space as it was given.
  for prefix in ("b a", "b a ", " b", "", "<|end|>b"):
    open_turn = [*TALK[:1], {"role": "assistant", "content": prefix}]
    text = model.apply_chat_template(open_turn, add_generation_prompt=False)
    assert text == "<s><|user|>a b<|end|><|assistant|>" + prefix
  # A protocol that wants a beginning does not double the template's.
  dream = protocols.named("dream", {})
  monkeypatch.setattr(model, "protocol", dream)
  assert model._context(tokenizer.encode(text), 99)[:2] == [3, 4]
  assert model._context([0], 99) == [3, 0]


def test_templates_without_a_system_message(model, tmp_path, monkeypatch):
  refuses = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}"
    "{% endif %}" + TEMPLATE
  )
  tokenizer = huggingface(tokenizer_folder(tmp_path, chat_template=refuses))
  monkeypatch.setattr(model._run, "tokenizer", tokenizer)
  monkeypatch.setattr(model, "_rendered", False)
  monkeypatch.setattr(contexts, "_said", set())
  system = {"role": "system", "content": "b"}
  with pytest.warns(UserWarning, match="takes no system message"):
    text = model.apply_chat_template([system, *TALK[:1]])
  assert text == "<s><|user|>a b<|end|><|assistant|>"


# EleutherAI/lm-evaluation-harness 0.4.13, `_encode_pair`: what is left of the
# whole, which is nothing, or not the answer, where one token spans both.
@pytest.mark.parametrize(
  ("pair", "expected"),
  [
    (("Ans", "wer"), (["Ans"], ["wer"])),
    (("Ans", "w"), (["Ans"], ["w"])),
    (("An", "swer"), (["An"], ["s", "wer"])),
    (("An", "sw"), (["An"], ["s", "w"])),
    (("A", "nswer"), (["A"], ["n", "s", "wer"])),
    (("", "wer"), ([], ["wer"])),
    (("Ans ", "we"), (["Ans"], [" ", "we"])),
    (("Ans", ""), (["Ans"], [])),
  ],
  ids=str,
)
def test_an_answer_that_shares_a_token_is_encoded_by_itself(
  pair, expected, spanning
):
  tokenizer = huggingface(str(spanning))
  name = tokenizer._tokenizer.id_to_token
  found = contexts.divided(tokenizer.encode, *pair)
  assert tuple([name(i) for i in part] for part in found) == expected


@pytest.fixture(scope="module")
def spanning(tmp_path_factory):
  """A tokenizer with Ans, wer and Answer, one token each."""
  folder = tmp_path_factory.mktemp("spanning")
  letters = " Answer"
  merges = [("A", "n"), ("An", "s"), ("w", "e"), ("we", "r"), ("Ans", "wer")]
  words = dict.fromkeys([*letters, *(a + b for a, b in merges)])
  vocabulary = {word: i for i, word in enumerate(words)}
  made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
  made.save(str(folder / "tokenizer.json"))
  return folder


def test_flags_of_the_command_reach_the_class(workdir):
  make = lambda **args: DiffusionLM(str(workdir), mc_num=8, **args)
  for size in ("auto", "auto:4", None, 16, "16"):
    assert make(batch_size=size)._rows == 16
  unused = {"trust_remote_code": True, "device": "cuda:0", "max_batch_size": 8}
  assert make(**unused)._rows == 16
  assert make(max_length=64)._length == 64
  assert make(max_gen_toks="64").protocol.max_gen_toks == 64
  for args, said in (
    ({"batch_size": "many"}, "must be auto, auto:N or a number"),
    ({"pretrained": "x"}, "workdir=DIR names the run"),
    ({"dtype": "float32"}, "which dllm convert sets"),
    ({"nonsense": 1}, "unknown --model_args nonsense; legal: workdir"),
  ):
    with pytest.raises(ValueError, match=said):
      make(**args)


# What lm_eval makes of `banned=5` is a number, of JSON a list.
@pytest.mark.parametrize("given", [5, "5", [5, 6], "5,6", "5+6", "5;6", "5 6"])
def test_ids_of_model_args(workdir, given):
  model = DiffusionLM(str(workdir), mc_num=8, banned=given, forced=7)
  filters = model._sampler.build(model._run.objective, length=32).policy.filters
  ids = (5,) if str(given) == "5" else (5, 6)
  assert [f.tokens for f in filters] == [ids, (7,)]


# huggingface/lighteval issue 559: greedy tasks were sampled at temperature 1.
@pytest.mark.parametrize("protocol", ["default", "llada", "dream_code"])
@pytest.mark.parametrize(
  "wish",
  [
    {"do_sample": False, "temperature": 0.0},
    {"do_sample": False},
    {"temperature": 0.0},
    {"do_sample": False, "temperature": 0.7},
  ],
  ids=str,
)
def test_greedy_is_greedy(model, monkeypatch, protocol, wish):
  monkeypatch.setattr(model, "protocol", protocols.named(protocol, {}))
  monkeypatch.setattr(model, "_length", 2000)
  config = model._asked("A", {**wish, "max_gen_toks": 8})[2]
  assert config.temperature == 0.0


def test_warm_is_warm(model):
  asked = lambda **wish: model._asked("A", wish | {"max_gen_toks": 8})[2]
  assert asked(do_sample=True, temperature=0.7).temperature == 0.7
  assert asked(temperature=0.7).temperature == 0.7
  assert asked() == model._sampler


# LLaDA's eval_llada.py cuts the text in which special tokens are written out.
def test_stops_may_be_special_tokens(tmp_path):
  tokenizer = huggingface(tokenizer_folder(tmp_path))
  ids = [0, 1, 6, 1, 4, 0]  # a b <|end|> b <|user|> a
  stop = lambda *until: contexts.stopped(ids, until, tokenizer.decode).rstrip()
  assert stop() == "a b b a" == stop("")
  assert stop("<|end|>") == "a b"
  assert stop("<|user|>", "<|nothing|>") == "a b b"
  assert stop("b") == "a"
  assert stop("<|end|> b", "<|user|>") == "a b"
  assert contexts.behind(ids, "<|end|>", tokenizer.decode) == [1, 4, 0]
  assert contexts.behind(ids, "<|nothing|>", tokenizer.decode) == ids


def test_a_cache_resumes(model, tmp_path, monkeypatch):
  asked = ask(*[("To be", f" {word}") for word in "abcde"])
  cache = CachingLM(model, str(tmp_path / "cache.db"))
  real, calls = Scorer.nats, []

  def dies(self, keys, batch):
    calls.append(1)
    if len(calls) > 4:
      raise KeyboardInterrupt
    return real(self, keys, batch)

  monkeypatch.setattr(Scorer, "nats", dies)
  with pytest.raises(KeyboardInterrupt):
    cache.loglikelihood(asked)
  assert len(calls) == 5  # four are known
  calls[:] = [1] * 3  # one more is allowed
  values = cache.loglikelihood(asked)
  assert len(calls) == 4
  monkeypatch.setattr(Scorer, "nats", real)
  assert [tuple(v) for v in values] == model.loglikelihood(asked)


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
  _task(
    tmp_path,
    "toy_beams",
    [{"q": "ROMEO:", "a": "x"}],
    output_type="generate_until",
    doc_to_text="{{q}}",
    doc_to_target="{{a}}",
    generation_kwargs={"until": ["\n"], "num_beams": 4},
    metric_list=[{"metric": "exact_match"}],
  )
  return tmp_path


@pytest.mark.all
def test_the_real_command_on_local_tasks(workdir, tasks, capsys):
  out = tasks / "out"

  def harness(names):
    return main([
      "harness", "run", "--model", "dllm_jax", "--model_args",
      f"workdir={workdir},protocol=llada,mc_num=4,length=32,max_gen_toks=8",
      "--tasks", names, "--include_path", str(tasks), "--batch_size", "4",
      "--output_path", str(out), "--log_samples",
    ])  # fmt: skip

  assert harness("toy_beams") == 2 and not out.exists()
  said = [x for x in capsys.readouterr().err.splitlines() if "dllm: " in x]
  assert len(said) == 1 and "cannot be asked for num_beams" in said[0]
  status = harness("toy_choice,toy_rolling,toy_generation")
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

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

import lm_eval  # noqa: E402
from lm_eval.api.model import CachingLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from dllm_jax.cli.main import main  # noqa: E402
from dllm_jax.data.huggingface import huggingface  # noqa: E402
from dllm_jax.evaluation.harness import protocols  # noqa: E402
from dllm_jax.evaluation.harness.model import DiffusionLM  # noqa: E402
from dllm_jax.evaluation.likelihood import contexts, documents
from dllm_jax.evaluation.likelihood.scorer import Item, Scorer  # noqa: E402
from tests.data.test_chat import folder as tokenizer_folder  # noqa: E402
from tests.data.test_chat import TALK, TEMPLATE  # noqa: E402
from tests.pretrained.golden import publish  # noqa: E402


def ask(*args):
  return [types.SimpleNamespace(args=arg) for arg in args]


@pytest.fixture(scope="module")
def model(workdir):
  return DiffusionLM(str(workdir), batch_size=4, mc_num=8)


@pytest.mark.all
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


@pytest.mark.all
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
  # An empty one is certain, and no end of all other requests.
  assert model.loglikelihood_rolling(ask(("",))) == [0.0]


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
  assert likelihoods["llada"] == ("counts", 128, 8, None, False)
  assert likelihoods["llada_single"] == ("counts", 1, 1, None, False)
  assert likelihoods["dream"] == ("times", 128, 32, True, True)
  answers = {
    name: (p.fixed, p.max_gen_toks, dict(p.fields))
    for name, p in protocols.PROTOCOLS.items()
  }
  cold, warm = ({"temperature": t, "top_p": 0.95} for t in (0.0, 0.2))
  assert answers["llada"] == (True, 1024, {"temperature": 0.0})
  assert answers["llada_blocks"][2]["block_length"] == 8
  # EVAL.md of LLaDA: `confidence_eos_eot_inf` of Instruct and of 1.5.
  surest = {"temperature": 0.0, "doubt_end": True}
  assert answers["llada_instruct"] == (True, 512, surest)
  assert answers["llada_1p5"] == (True, 256, surest | {"block_length": 16})
  assert answers["dream"] == (True, 256, cold)
  assert answers["dream_code"] == (True, 512, warm)
  with pytest.raises(ValueError, match="legal: default, llada"):
    protocols.named("gpt", {})
  with pytest.raises(ValueError, match="unknown --model_args speed; legal"):
    protocols.named("llada", {"speed": 9})
  with pytest.raises(ValueError, match="multiple of strata=8"):
    protocols.named("llada", {"mc_num": 42})


def test_what_stands_around_an_answer(model, monkeypatch):
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


def test_named_templates_and_their_variables(model, tmp_path, monkeypatch):
  wishful = "{% if enable_thinking %}<|user|>{% endif %}" + TEMPLATE
  named = [
    {"name": "default", "template": TEMPLATE},
    {"name": "wishful", "template": wishful},
  ]
  tokenizer = huggingface(tokenizer_folder(tmp_path, chat_template=named))
  monkeypatch.setattr(model._run, "tokenizer", tokenizer)
  monkeypatch.setattr(model, "_rendered", False)
  monkeypatch.setattr(model, "_template", {"enable_thinking": True})
  plain = "<s><|user|>a b<|end|><|assistant|>"
  assert model.apply_chat_template(TALK[:1]) == plain
  # --apply_chat_template NAME, --model_args enable_thinking=True.
  assert model.chat_template("wishful") == wishful
  assert model.apply_chat_template(TALK[:1]) == "<|user|>" + plain
  with pytest.raises(ValueError, match="no chat template 'x'; legal: default"):
    model.chat_template("x")


def test_beginnings_of_texts(model, tmp_path, monkeypatch):
  folder = tokenizer_folder(tmp_path, add_bos_token=True)
  tokenizer = huggingface(folder)
  monkeypatch.setattr(model._run, "tokenizer", tokenizer)
  begins = lambda **fields: monkeypatch.setattr(
    model, "protocol", protocols.named("default", fields)
  )
  for fields, expected in (
    ({}, [3]),
    ({"add_bos_token": True}, [3]),
    ({"begin": "False"}, []),
  ):
    begins(**fields)
    assert model._context(model._encode("a"), 9) == [*expected, 0]
    assert model._windows("a")[0].tokens == (*expected, 0)
    item = model._pair("a", " b")
    assert item.tokens == (*expected, 0, 1) and item.targets == 1
  begins()
  assert model._context(model._encode("<s>a"), 9) == [3, 0]
  assert model._windows("<s>a")[0] == Item(tokens=(3, 0), given=1)
  assert model._windows("") == []


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


@pytest.mark.all
def test_flags_of_the_command_reach_the_class(workdir):
  make = lambda **args: DiffusionLM(str(workdir), mc_num=8, **args)
  for size in ("auto", "auto:4", None, 16, "16"):
    assert make(batch_size=size)._rows == 16
  unused = {"trust_remote_code": True, "device": "cuda:0", "max_batch_size": 8}
  assert make(**unused)._rows == 16
  assert make(**unused, batch_size="auto:2")._rows == 8
  assert make(max_length=64)._length == make(length="64")._length == 64
  # From Python, values may be text.
  texts = {"max_gen_toks": "64", "fixed": "False", "overlap": "2"}
  model = make(seed="3", **texts, steps="5", top_p="0.5", stop="None")
  assert model._seed == 3 and model._sampler.steps == 5
  assert (model._sampler.top_p, model._sampler.stop) == (0.5, None)
  assert (model.protocol.max_gen_toks, model.protocol.fixed) == (64, False)
  # LLaDA's `cfg` guides likelihoods and answers.
  assert make(cfg_scale=2)._sampler.cfg_scale == 2.0
  for args, said in (
    ({"batch_size": "many"}, "must be auto, auto:N or a number"),
    ({"batch_size": "auto", "max_batch_size": 0}, "must be at least 1"),
    ({"pretrained": "x"}, "workdir=DIR names the run"),
    ({"revision": "main"}, "dllm convert makes one of a folder"),
    ({"dtype": "float32"}, "which dllm convert sets"),
    ({"nonsense": 1}, "unknown --model_args nonsense; legal: workdir"),
    ({"steps": "few"}, "--model_args steps must be int, not 'few'"),
    ({"greedy": 3}, "--model_args greedy must be bool, not 3"),
    ({"max_gen_toks": 1.5}, "max_gen_toks must be int, not 1.5"),
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
  # Text, whole numbers, and what is none at all: lm_eval's Norwegian tasks.
  assert asked(temperature="0.0").temperature == 0.0
  assert asked(do_sample=True, temperature=1, num_beams=1).temperature == 1.0
  assert asked(repetition_penalty=1.2).repetition_penalty == 1.2


# huggingface/lighteval issue 559, as a whole: no seed decides a greedy answer.
@pytest.mark.all
def test_greedy_answers_do_not_depend_on_the_seed(judge):
  wish = {"until": [], "max_gen_toks": 8, "do_sample": False}
  found = [
    DiffusionLM(str(judge), batch_size=1, mc_num=8, seed=seed).generate_until(
      ask(("A", wish)), disable_tqdm=True
    )
    for seed in (0, 1)
  ]
  assert found[0] == found[1] and len(found[0][0]) == 8


def test_answers_that_share_a_token_have_a_likelihood(
  model, spanning, monkeypatch
):
  monkeypatch.setattr(model._run, "tokenizer", huggingface(str(spanning)))
  pairs = [("Ans", "wer"), ("Ans", "w"), ("An", "sw"), ("Ans", "")]
  *found, empty = model.loglikelihood(ask(*pairs), disable_tqdm=True)
  assert empty == (0.0, True)
  assert all(np.isfinite(value) and value < 0 for value, _ in found)


# One rule of where an answer's tokens begin, for both commands.
@pytest.mark.all
def test_pairs_of_evaluate_are_scored_alike(workdir, tmp_path, capsys):
  pairs = [("To be ", "or"), ("To be", " or"), ("a \n", "b"), ("", "a")]
  file = tmp_path / "pairs.jsonl"
  named = [{"prompt": p, "answer": a} for p, a in pairs]
  file.write_text("\n".join(map(json.dumps, named)))
  flags = f"--workdir={workdir}", f"--pairs={file}", "--estimator=left"
  assert main(["evaluate", *flags]) == 0
  found = json.loads(capsys.readouterr().out.splitlines()[-1])
  model = DiffusionLM(str(workdir), batch_size=4, estimator="left")
  asked = model.loglikelihood(ask(*pairs), disable_tqdm=True)
  values = [value for value, _ in asked]
  np.testing.assert_allclose(found["log_likelihoods"], values, rtol=1e-4)
  assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_thoughts_are_left_out(model, tmp_path, monkeypatch):
  tokenizer = huggingface(tokenizer_folder(tmp_path, eos_token="<|end|>"))
  monkeypatch.setattr(model._run, "tokenizer", tokenizer)
  answer = [0, 4, 1, 6, 0, 4, 0]  # a <|user|> b <|end|> a <|user|> a
  for mark, expected in ((None, "a b"), ("<|user|>", "b"), (4, "b")):
    monkeypatch.setattr(model, "_think_end", mark)
    assert model._text(answer, []) == expected
  assert model._text(answer, ["b"]) == ""


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


# EleutherAI/lm-evaluation-harness PR 2615: `gen_prefix` begins the answer.
@pytest.mark.all
def test_a_prefix_of_the_answer_from_python(tmp_path):
  folder, workdir = tmp_path / "in", tmp_path / "run"
  publish("llada_logits", folder, mask_token_id=7, eos_token_id=6)
  tokenizer_folder(folder, chat_template=TEMPLATE)
  flags = f"--from_hf={folder}", f"--workdir={workdir}"
  assert main(["convert", *flags]) == 0
  _task(
    tmp_path,
    "prefilled",
    [{"q": "a", "a": "x"}],
    output_type="generate_until",
    doc_to_text="{{q}}",
    doc_to_target="{{a}}",
    gen_prefix="b a",
    generation_kwargs={"until": [], "max_gen_toks": 4},
    metric_list=[{"metric": "exact_match"}],
  )
  found = lm_eval.simple_evaluate(
    model="dllm_jax",
    model_args={"workdir": str(workdir), "length": 32, "forced": 1},
    tasks=["prefilled"],
    batch_size="auto:2",
    max_batch_size=1,
    task_manager=TaskManager(
      include_path=str(tmp_path), include_defaults=False
    ),
    apply_chat_template=True,
    bootstrap_iters=0,
  )
  (sample,) = found["samples"]["prefilled"]
  assert sample["arguments"][0][0] == "<s><|user|>a<|end|><|assistant|>b a"
  assert sample["resps"] == [["b b b b"]]


@pytest.mark.all
def test_the_real_command_on_local_tasks(workdir, tasks, capsys):
  out = tasks / "out"

  def harness(names, *flags):
    return main([
      "harness", "run", "--model", "dllm_jax", "--model_args",
      f"workdir={workdir},protocol=llada,mc_num=4,length=32,max_gen_toks=8",
      "--tasks", names, "--include_path", str(tasks),
      "--output_path", str(out), "--log_samples", *flags,
    ])  # fmt: skip

  assert harness("toy_beams") == 2 and not out.exists()
  said = [x for x in capsys.readouterr().err.splitlines() if "dllm: " in x]
  assert len(said) == 1 and "cannot be asked for num_beams" in said[0]
  # lm_eval adds `--trust_remote_code` to the class's arguments.
  flags = "--batch_size", "auto:4", "--max_batch_size", "4"
  names = "toy_choice,toy_rolling,toy_generation"
  status = harness(names, *flags, "--trust_remote_code")
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

"""Decisions by the openai package: predicates, choices, scores and refusals."""

import types

import openai
import pytest

from dllm_jax.sampling.decisions.answers import Answer
from dllm_jax.sampling.decisions.layout import Layout, Question
from dllm_jax.serving import decisions
from tests.serving import servers
from tests.serving.servers import NAME


@pytest.fixture
def client(server):
  with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as made:
    yield made


def decide(client, question, given="hi"):
  made = client.decisions.create(
    model=NAME, input=given, questions=[{"instructions": "ok?"} | question]
  )
  (answer,) = made.answers
  return made, answer


@pytest.mark.all
def test_a_choice_is_that_of_the_run(client, server):
  values = [{"value": "a"}, {"value": "b", "description": "x"}]
  question = {"type": "choice", "choices": values, "name": "q"}
  made, answer = decide(client, question)
  asked = Question(instructions="ok?", labels=("a", "b"), hints=("", "x"))
  (own,) = server.run.decide("hi", [asked])
  assert (answer.type, answer.name, made.model) == ("choice", "q", NAME)
  found = {p.value: p.probability for p in answer.probabilities}
  assert found == pytest.approx(
    dict(zip("ab", own.probabilities, strict=True)), abs=1e-5
  )
  assert answer.choice == "ab"[own.best]
  assert answer.confidence == pytest.approx(own.confidence, abs=1e-5)
  assert made.usage.output_tokens == 2
  assert made.usage.total_tokens == made.usage.input_tokens + 2


@pytest.mark.all
def test_predicates_and_scores(client):
  _, answer = decide(client, {"type": "predicate"})
  assert answer.type == "predicate" and 0 < answer.probability < 1
  levels = [{"label": "a"}, {"label": "b"}]
  _, answer = decide(client, {"type": "score", "levels": levels})
  assert answer.type == "score"
  assert answer.score == pytest.approx(answer.probabilities[1].probability)
  values = [{"value": True}, {"value": False}]
  _, answer = decide(client, {"type": "choice", "choices": values})
  assert answer.choice in (True, False)


@pytest.mark.parametrize(
  "question, named",
  [
    ({"type": "choice", "choices": [{"value": "a"}]}, "2 items"),
    ({"type": "choice", "choices": [{"value": "a"}] * 2}, "differ"),
    ({"type": "predicate", "instructions": "x" * 99}, "more than the"),
    ({"type": "guess"}, "predicate"),
  ],
)
@pytest.mark.all
def test_what_is_wrong_is_said(client, question, named):
  with pytest.raises(openai.BadRequestError, match=named):
    decide(client, question)


def test_several_processes_decide_nothing(client, monkeypatch):
  several = types.SimpleNamespace(store=object)
  monkeypatch.setattr(decisions, "distributed", several)
  with pytest.raises(openai.BadRequestError, match="need one process") as error:
    decide(client, {"type": "predicate"})
  assert "\n" not in error.value.body["message"]


@pytest.mark.parametrize(
  "mass, tokens, kind",
  [
    (1e-5, 1, "predicate"),
    (1e-7, 1, "refusal"),
    (1e-7, 2, "predicate"),
    (1e-13, 2, "refusal"),
    (0.0, 90, "refusal"),  # of which the least is 0
  ],
)
def test_labels_are_unlikely_by_the_token(mass, tokens, kind):
  body = decisions.Decision(
    model=NAME,
    input="hi",
    questions=[{"type": "predicate", "instructions": "ok?"}],
  )
  labels = ((2,) * tokens, (3,) * (tokens + 1))
  layout = Layout(row=(1, None), slots=(1,), labels=(labels,))
  answer = Answer(probabilities=(0.25, 0.75), mass=mass)
  made = decisions.response(body, layout, [answer])
  assert [one["type"] for one in made["answers"]] == [kind]


@pytest.mark.all
def test_a_conversation_is_asked_by_its_template(client):
  said = [{"role": "user", "content": "hi"}]
  with pytest.raises(openai.BadRequestError, match="more than the"):
    decide(client, {"type": "predicate"}, said)  # of 48 tokens


SCHEMA = {
  "type": "object",
  "properties": {"a": {"type": "integer"}},
  "required": ["a"],
}


@pytest.fixture(scope="module")
def following(tiny_run):
  """A server that holds answers to languages."""
  running = servers.Running(tiny_run, languages=64).start()
  yield running
  running.stop()


@pytest.mark.all
def test_answers_have_the_form_that_was_asked_for(following):
  import json
  import re

  with openai.OpenAI(
    base_url=f"{following.url}/v1", api_key="none", max_retries=0
  ) as client:

    def text(**asked):
      messages = [{"role": "user", "content": "?"}]
      made = client.chat.completions.create(
        model=NAME, messages=messages, max_tokens=20, **asked
      )
      return made.choices[0].message.content

    form = {
      "type": "json_schema",
      "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
    }
    for seed in range(3):
      made = json.loads(text(response_format=form, seed=seed))
      assert isinstance(made["a"], int)
      extra = {"guided_choice": ["red", "blue"]}
      assert text(extra_body=extra, seed=seed) in ("red", "blue")
      extra = {"structured_outputs": {"regex": "[0-9]{3}(-[a-c]+)?"}}
      assert re.fullmatch(
        "[0-9]{3}(-[a-c]+)?", text(extra_body=extra, seed=seed)
      )
      assert text(seed=seed)  # a row without a language beside them
    for wrong, named in (
      ({"guided_regex": "(a"}, "guided_regex"),
      ({"guided_regex": "a{30}"}, "shortest has 30"),
      ({"guided_regex": "a", "guided_choice": ["b"]}, "give one"),
      ({"guided_json": {"type": "string", "format": "email"}}, "email"),
    ):
      with pytest.raises(openai.BadRequestError, match=named):
        text(extra_body=wrong)

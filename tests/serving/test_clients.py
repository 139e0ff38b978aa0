"""Real clients over loopback: the openai package, and schemathesis."""

import asyncio
import subprocess
import sys

import openai
import pytest

from tests.serving import servers
from tests.serving.servers import NAME, Running, SEED

MESSAGES = [{"role": "user", "content": "Who?"}]
ASKED = {"model": NAME, "seed": SEED, "max_tokens": 12}


@pytest.fixture
def client(server):
  with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as made:
    yield made


@pytest.fixture(scope="module")
def answer(server):
  """What the offline sampler answers."""
  ids = [int(i) for i in server.run.tokenizer.chat(MESSAGES)]
  row = server.offline([*ids, *[None] * 12], seed=SEED)
  return server.run.tokenizer.decode(row[len(ids) :])


def test_models(client):
  assert [model.id for model in client.models.list()] == [NAME]
  assert client.models.retrieve(NAME).owned_by == "dllm_jax"


def test_chat(client, answer):
  made = client.chat.completions.create(messages=MESSAGES, **ASKED)
  (choice,) = made.choices
  assert choice.message.role == "assistant"
  assert choice.message.content == answer
  assert made.usage.completion_tokens <= 12
  assert made.usage.prompt_tokens_details.cached_tokens >= 0
  parts = [{"type": "text", "text": part} for part in ("Wh", "o?")]
  turns = [{"role": "user", "content": parts}]
  again = client.chat.completions.create(messages=turns, **ASKED)
  assert again.choices[0].message.content == answer


def in_pieces(read):
  """Asks until a stream came in several pieces: what is new since the last one
  goes into one, and a busy machine sends few."""
  assert any(read() > 1 for _ in range(10))


def test_chat_in_a_stream(client, answer):
  def read():
    stream = client.chat.completions.create(
      messages=MESSAGES,
      stream=True,
      stream_options={"include_usage": True},
      extra_body={"stream_drafts": True},
      **ASKED,
    )
    chunks = list(stream)
    pieces = [c.choices[0].delta.content for c in chunks if c.choices]
    assert "".join(piece or "" for piece in pieces) == answer
    assert chunks[-1].usage.total_tokens > 12 and not chunks[-1].choices
    return sum(map(bool, pieces))

  in_pieces(read)


def test_chat_by_the_stream_helper(client, answer):
  # The helper takes an answer that ends by its length for a failure.
  asked = ASKED | {"stop": answer[-2:]}

  def read():
    with client.chat.completions.stream(messages=MESSAGES, **asked) as stream:
      kinds = [event.type for event in stream]
      made = stream.get_final_completion()
    assert made.choices[0].message.content == answer.partition(answer[-2:])[0]
    assert kinds[-1] == "content.done"
    assert made.choices[0].finish_reason == "stop"
    return kinds.count("content.delta")

  in_pieces(read)


def test_completions(client, server):
  wanted = server.text("ROMEO:", 12, seed=SEED)
  made = client.completions.create(prompt="ROMEO:", logprobs=0, **ASKED)
  (choice,) = made.choices
  assert choice.text == wanted
  assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs)
  stream = client.completions.create(prompt="ROMEO:", stream=True, **ASKED)
  assert "".join(chunk.choices[0].text for chunk in stream) == wanted


def test_several_at_once(server, answer):
  async def ask():
    async with openai.AsyncOpenAI(
      base_url=f"{server.url}/v1", api_key="none"
    ) as made:
      create = made.chat.completions.create
      return await asyncio.gather(
        *(create(messages=MESSAGES, **ASKED) for _ in range(9))
      )

  found = [made.choices[0].message.content for made in asyncio.run(ask())]
  assert found == [answer] * 9


def test_errors(client):
  with pytest.raises(openai.BadRequestError) as error:
    client.chat.completions.create(
      messages=MESSAGES, tools=[{"type": "function"}], **ASKED
    )
  assert error.value.param == "tools" and error.value.code
  with pytest.raises(openai.NotFoundError) as error:
    client.chat.completions.create(
      messages=MESSAGES, **ASKED | {"model": "gpt"}
    )
  assert error.value.code == "model_not_found"


def test_a_key_is_wanted_and_a_full_server_is_asked_again(tiny_run, limits):
  # An engine that was never started compiles nothing.
  running = Running(
    tiny_run, key="the key", limits=limits(drain_seconds=1.0), queue=0
  )
  try:
    base = f"{running.url}/v1"
    with openai.OpenAI(base_url=base, api_key="the") as client:
      with pytest.raises(openai.AuthenticationError) as error:
        client.models.list()
      assert error.value.code == "invalid_api_key"
    assert servers.send(f"{running.url}/health")[0] == 503
    assert servers.send(f"{running.url}/")[0] == 200
    assert servers.send(f"{running.url}/metrics")[0] == 401
    asked = []

    def seen(request):
      asked.append(request.headers["x-stainless-retry-count"])

    with openai.OpenAI(
      base_url=base,
      api_key="the key",
      http_client=openai.DefaultHttpxClient(event_hooks={"request": [seen]}),
    ) as client:
      assert client.models.list().data and asked.pop() == "0"
      client = client.with_options(max_retries=1)
      with pytest.raises(openai.InternalServerError) as error:
        client.completions.create(prompt="", **ASKED)
    assert error.value.code == "unavailable"
    assert error.value.response.headers["retry-after"]
    assert asked == ["0", "1"]
  finally:
    running.stop()


@pytest.mark.all
def test_our_description_holds(server, tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, "-m", "schemathesis.cli", "run"),
      f"{server.url}/openapi.json",
      *("--max-examples=20", "--seed=1", "--max-time=60"),
      "--phases=coverage,fuzzing",
      *("--checks=not_a_server_error,status_code_conformance,"
        "content_type_conformance,response_schema_conformance",),
      *("--suppress-health-check=all", "--generation-database=none"),
    ],
    capture_output=True,
    text=True,
    check=False,
    cwd=tmp_path,
    timeout=300,
  )  # fmt: skip
  assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]

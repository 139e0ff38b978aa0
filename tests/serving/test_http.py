"""Routes and what they refuse, by plain HTTP."""

import json
import re
import shutil
import socket
import subprocess
import time

import jax
import pytest

from dllm_jax.evaluation.likelihood.scorer import Item, Scorer
from tests.serving.servers import (
  CHOICES,
  events,
  LENGTH,
  NAME,
  SEED,
  send,
  SLOTS,
)

COMPLETION = {"model": NAME, "prompt": "ROMEO:", "max_tokens": 16, "seed": SEED}
CHAT = {
  "model": NAME,
  "messages": [{"role": "user", "content": "Who?"}],
  "max_tokens": 12,
  "seed": SEED,
}
ROUTES = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}


def test_a_completion_is_that_of_the_offline_sampler(server):
  body = COMPLETION | {"n": 2, "prompt": ["ROMEO:", "a"]}
  status, _, made = send(f"{server.url}/v1/completions", body)
  assert status == 200, made
  assert [choice["index"] for choice in made["choices"]] == [0, 1, 2, 3]
  prompts = ["ROMEO:", "ROMEO:", "a", "a"]
  for i, (prompt, choice) in enumerate(
    zip(prompts, made["choices"], strict=True)
  ):
    assert choice["text"] == server.text(prompt, 16, seed=SEED, number=i)
    assert choice["finish_reason"] in ("length", "stop")
  used = made["usage"]
  assert used["prompt_tokens"] == 6 + 1
  assert used["total_tokens"] == used["completion_tokens"] + 7
  assert used["prompt_tokens_details"] == {"cached_tokens": 0}


def test_prompts_are_text_or_ids(server):
  texts = []
  for prompt in ("ROMEO:", [*b"ROMEO:"], [[*b"ROMEO:"]]):
    body = COMPLETION | {"prompt": prompt, "echo": True}
    _, _, made = send(f"{server.url}/v1/completions", body)
    texts.append(made["choices"][0]["text"])
  assert len(set(texts)) == 1 and texts[0].startswith("ROMEO:")


def test_a_suffix_is_infilling(server):
  body = COMPLETION | {"prompt": "To be", "suffix": " not", "max_tokens": 9}
  _, _, made = send(f"{server.url}/v1/completions", body)
  row = server.offline([*b"To be", *[None] * 9, *b" not"], seed=SEED)
  decode = server.run.tokenizer.decode
  assert made["choices"][0]["text"] == decode(row[5:-4])
  body |= {"suffix": None, "prompt": None, "max_tokens": None}
  body["infill"] = "To be[MASK*9] not"
  _, _, made = send(f"{server.url}/v1/completions", body)
  assert made["choices"][0]["text"] == decode(row)
  assert made["usage"]["prompt_tokens"] == 9


def test_a_mask_in_a_prompt_is_text(server):
  body = COMPLETION | {"prompt": "a [MASK] b", "echo": True}
  status, _, made = send(f"{server.url}/v1/completions", body)
  assert status == 200
  assert made["choices"][0]["text"].startswith("a [MASK] b")
  assert made["usage"]["prompt_tokens"] == len("a [MASK] b")
  turn = {"role": "user", "content": "[MASK]"}
  for body in (CHAT | {"messages": [turn]}, CHAT):
    status, _, made = send(f"{server.url}/v1/chat/completions", body)
    assert status == 200, made
  _, _, ids = send(f"{server.url}/tokenize", {"messages": [turn]})
  assert bytes(ids["tokens"]) == b"user: [MASK]\nassistant: "


def test_a_stop_ends_the_answer_and_is_left_out(server):
  text = server.text("ROMEO:", 16, seed=SEED)
  for size in (1, 3):  # one that lies across two blocks of 8
    stop = text[7 : 7 + size]
    body = COMPLETION | {"stop": [stop, "never that"]}
    _, _, made = send(f"{server.url}/v1/completions", body)
    (choice,) = made["choices"]
    assert choice["text"] == text.partition(stop)[0]
    assert choice["finish_reason"] == "stop"


def test_log_probabilities_are_those_of_the_tokens(server):
  stop = server.text("ROMEO:", 16, seed=SEED)[9:11]
  body = COMPLETION | {"logprobs": 0, "stop": stop}
  _, _, made = send(f"{server.url}/v1/completions", body)
  (choice,) = made["choices"]
  told = choice["logprobs"]
  ids = [*map(ord, server.text("ROMEO:", 16, seed=SEED).partition(stop)[0])]
  assert choice["finish_reason"] == "stop" and ids
  assert len(told["tokens"]) == len(told["token_logprobs"]) >= len(ids)
  assert all(p <= 0.0 for p in told["token_logprobs"])
  assert told["text_offset"] == sorted(told["text_offset"])
  assert all(offset < len(choice["text"]) for offset in told["text_offset"])
  _, _, made = send(
    f"{server.url}/v1/chat/completions", CHAT | {"logprobs": True}
  )
  (choice,) = made["choices"]
  spelled = bytes(b for t in choice["logprobs"]["content"] for b in t["bytes"])
  assert spelled.decode(errors="replace") == choice["message"]["content"]


def test_choices_of_a_row_are_heeded(server):
  for given in (
    {"temperature": 0},
    {"temperature": 0.7, "top_p": 0.8, "top_k": 5},
    {
      "presence_penalty": 2,
      "frequency_penalty": 1.5,
      "logit_bias": {"97": 100},
    },
    {"repetition_penalty": 1.5, "min_p": 0.01, "min_tokens": 4},
  ):
    body = COMPLETION | given
    _, _, made = send(f"{server.url}/v1/completions", body)
    options = given | {"seed": SEED}
    if "logit_bias" in given:
      options["logit_bias"] = {97: 100.0}
    wanted = server.text("ROMEO:", 16, **options)
    assert made["choices"][0]["text"] == wanted
  assert "a" in server.text("ROMEO:", 16, logit_bias={97: 100.0}, seed=SEED)


def test_without_a_seed_answers_differ(server):
  body = COMPLETION | {"seed": None}
  ask = lambda: send(f"{server.url}/v1/completions", body)[2]["choices"]
  assert ask() != ask()


def test_the_best_tokens_stand_beside_each(server):
  body = COMPLETION | {"logprobs": 2, "temperature": 0}
  _, _, made = send(f"{server.url}/v1/completions", body)
  told = made["choices"][0]["logprobs"]
  for p, best in zip(told["token_logprobs"], told["top_logprobs"], strict=True):
    assert 1 <= len(best) <= 2 and max(best.values()) >= p
  body = CHAT | {"logprobs": True, "top_logprobs": 1, "temperature": 0}
  _, _, made = send(f"{server.url}/v1/chat/completions", body)
  for token in made["choices"][0]["logprobs"]["content"]:
    (best,) = token["top_logprobs"]
    assert best["logprob"] <= 0.0 and best["bytes"]


@pytest.mark.parametrize("route", ROUTES)
def test_a_stream_is_the_answer_in_pieces(server, route):
  body = ROUTES[route] | {"logprobs": True if "chat" in route else 0, "n": 2}
  _, _, whole = send(f"{server.url}{route}", body)
  more = {"stream": True, "stream_options": {"include_usage": True}}
  chunks = events(f"{server.url}{route}", body | more)
  assert chunks.pop() == ("message", "[DONE]")
  chunks = [json.loads(data) for _, data in chunks]
  last = chunks.pop()
  assert last["choices"] == [] and last["usage"] == whole["usage"]
  assert all(chunk["usage"] is None for chunk in chunks)
  for index, choice in enumerate(whole["choices"]):
    own = [
      c for chunk in chunks for c in chunk["choices"] if c["index"] == index
    ]
    if "chat" in route:
      assert own[0]["delta"]["role"] == "assistant"
      text = "".join(c["delta"].get("content", "") for c in own)
      assert text == choice["message"]["content"]
      told = [
        token
        for c in own
        if c["logprobs"]
        for token in c["logprobs"]["content"]
      ]
      assert told == choice["logprobs"]["content"]
    else:
      assert "".join(c["text"] for c in own) == choice["text"]
      told = [p for c in own for p in c["logprobs"]["token_logprobs"]]
      assert told == choice["logprobs"]["token_logprobs"]
    assert [c["finish_reason"] for c in own[:-1]] == [None] * (len(own) - 1)
    assert own[-1]["finish_reason"] == choice["finish_reason"]


def test_drafts_show_the_canvas(server):
  body = COMPLETION | {"stream": True, "stream_drafts": True, "echo": True}
  told = events(f"{server.url}/v1/completions", body)
  drafts = [json.loads(data) for name, data in told if name == "draft"]
  assert drafts and all(draft["choices"] == [] for draft in drafts)
  calls = [draft["call"] for draft in drafts]
  assert calls == sorted(set(calls))
  for draft in drafts:
    assert len(draft["slots"]) == 16
    for slot in draft["slots"]:
      assert (slot["text"] is None) == (slot["p"] is None)
  shown = [sum(s["text"] is not None for s in d["slots"]) for d in drafts]
  assert shown == sorted(shown)
  _, _, made = send(f"{server.url}/v1/completions", COMPLETION)
  assert shown[-1] == made["usage"]["completion_tokens"]
  assert calls[-1] == made["usage"]["network_calls"]
  letters = [c for c in made["choices"][0]["text"] if c != "\ufffd"]
  spelled = b"".join(
    (s["text"] or "").encode() for s in drafts[-1]["slots"]
  ).decode()
  assert letters[0] in spelled


def test_fewer_steps_are_fewer_calls_of_the_same_program(server):
  programs = server.engine._program.programs()
  for steps, calls in ((None, 16), (2, 4), (8, 16)):
    body = COMPLETION | ({} if steps is None else {"steps": steps})
    status, _, made = send(f"{server.url}/v1/completions", body)
    assert status == 200, made
    wanted = server.text("ROMEO:", 16, seed=SEED, steps=steps)
    assert made["choices"][0]["text"] == wanted
    assert made["usage"]["network_calls"] == calls
  assert server.engine._program.programs() == programs


def likelihood(server, ids, given):
  """Returns what the harness's estimator makes of an answer, nats."""
  scorer = Scorer.of(server.run, estimator="left")
  item, key = Item(tokens=tuple(ids), given=given), jax.random.key(0)
  return -scorer.score([item], samples=1, key=key, rows=1)[0]


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.few(1)
def test_the_tokens_of_an_echoed_prompt_are_told_first(server, text):
  prompt, ids = "ROMEO:", [*b"ROMEO:"]
  asked = COMPLETION | {"prompt": prompt if text else ids, "logprobs": 2}
  url = f"{server.url}/v1/completions"
  _, _, plain = send(url, asked)
  status, _, made = send(url, asked | {"echo": True})
  assert status == 200, made
  (choice,), (alone,) = made["choices"], plain["choices"]
  assert choice["text"] == prompt + alone["text"]
  told, own = choice["logprobs"], alone["logprobs"]
  assert told["tokens"] == [*prompt, *own["tokens"]]
  assert told["token_logprobs"][6:] == own["token_logprobs"]
  assert told["top_logprobs"][6:] == own["top_logprobs"]
  later = [at + 6 for at in own["text_offset"]]
  assert told["text_offset"] == [*range(6), *later]
  assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
  assert len(set(told["token_logprobs"][1:6])) == 5
  for given in (1, 4):
    said = sum(told["token_logprobs"][given:6])
    assert said == pytest.approx(likelihood(server, ids, given), abs=1e-4)
  for token, p, best in list(
    zip(told["tokens"], told["token_logprobs"], told["top_logprobs"])
  )[1:6]:
    assert best[token] == p <= max(best.values()) and len(best) in (2, 3)
  calls = [x["usage"]["network_calls"] for x in (plain, made)]
  assert calls[1] - calls[0] == 3  # 5 tokens, as many rows as slots


def test_nothing_is_written_after_an_echo_of_no_tokens(server):
  url = f"{server.url}/v1/completions"
  body = COMPLETION | {"prompt": ["ROMEO:", "a", ""], "echo": True}
  body |= {"logprobs": 0, "max_tokens": 0}
  status, _, made = send(url, body)
  assert status == 200, made
  assert [c["text"] for c in made["choices"]] == ["ROMEO:", "a", ""]
  assert {c["finish_reason"] for c in made["choices"]} == {"length"}
  told = [c["logprobs"]["token_logprobs"] for c in made["choices"]]
  assert [len(row) for row in told] == [6, 1, 0] and told[1] == [None]
  assert made["choices"][0]["logprobs"]["top_logprobs"] is None
  used = made["usage"]
  assert (used["prompt_tokens"], used["completion_tokens"]) == (7, 0)
  _, _, more = send(url, body | {"max_tokens": 1, "prompt": "ROMEO:"})
  assert more["choices"][0]["logprobs"]["token_logprobs"][:6] == told[0]
  chunks = [
    json.loads(data)
    for _, data in events(url, body | {"stream": True})
    if data != "[DONE]"
  ]
  for index, row in enumerate(told):
    own = [c for x in chunks for c in x["choices"] if c["index"] == index]
    said = [p for c in own for p in c["logprobs"]["token_logprobs"]]
    assert said == row and own[-1]["finish_reason"] == "length"


def test_the_names_of_special_tokens_are_told(server):
  _, _, made = send(f"{server.url}/tokenizer_info")
  assert made["eos_token"] == "<eos>" and made["bos_token"] is None
  assert "assistant" in made["chat_template"]
  body = {"prompt": made["eos_token"], "add_special_tokens": False}
  _, _, ids = send(f"{server.url}/tokenize", body)
  assert ids["tokens"] == [256]


def test_the_description_for_people_has_every_field_and_loads_nothing(server):
  _, headers, page = send(f"{server.url}/docs")
  assert send(f"{server.url}/redoc")[0] == 404
  policy = headers["Content-Security-Policy"]
  assert "default-src 'none'" in policy and "unsafe" not in policy
  assert not re.search(r"<script|src=|url\(|@import|https?:", page)
  assert re.findall(r'href="([^"#]+)', page) == ["openapi.json"]
  _, _, told = send(f"{server.url}/openapi.json")
  for path, methods in told["paths"].items():
    for method in methods:
      assert f"<h3>{method.upper()} {path}</h3>" in page
  schemas = told["components"]["schemas"]
  for name in ("Completion", "Chat", "Tokenize", "Decision", "StreamOptions"):
    part = page.partition(f'<h3 id="{name}">')[2].partition("<h3")[0]
    fields = re.findall(r"<tr><td><code>([^<]+)</code>", part)
    assert fields == list(schemas[name]["properties"])
  links = set(re.findall(r'href="#([^"]+)"', page))
  assert links == set(re.findall(r'id="([^"]+)"', page))
  seed = page.partition("<code>seed</code>")[2].partition("</tr>")[0]
  assert "integer from 0 below 4294967296" in seed


WRONG = {
  "model": ({"model": "gpt-5"}, 404, "model", "legal: 'tiny'"),
  "no model": ({"model": None}, 400, "model", "valid string"),
  "unknown": ({"tools": []}, 400, "tools", "unknown field"),
  "best_of": ({"best_of": 2}, 400, "best_of", "unknown field"),
  "negative": ({"max_tokens": -4}, 400, "max_tokens", "greater than or equal"),
  "text": ({"max_tokens": "4"}, 400, "max_tokens", "valid integer"),
  "bool": ({"n": True}, 400, "n", "valid integer"),
  "nan": ({"temperature": float("nan")}, 400, "temperature", "finite"),
  "hot": ({"temperature": 2.5}, 400, "temperature", "less than or equal to 2"),
  "top_p": ({"top_p": 0.0}, 400, "top_p", "greater than 0"),
  "seed": ({"seed": -1}, 400, "seed", "greater than or equal to 0"),
  "stop": ({"stop": ""}, 400, "stop", "at least 1 character"),
  "stops": ({"stop": ["a"] * 5}, 400, "stop", "at most 4"),
  "n": ({"n": CHOICES + 1}, 400, "n", f"at most {CHOICES}"),
  "long answer": ({"max_tokens": 4000}, 400, "max_tokens", "more than the"),
  "options": (
    {"stream_options": {"include_usage": True}},
    400,
    "stream_options",
    "stream=true",
  ),
  "drafts": ({"stream_drafts": True}, 400, "stream_drafts", "stream=true"),
  "bias": ({"logit_bias": {"x": 1.0}}, 400, "logit_bias", "pattern"),
  "stream": ({"stream": 1}, 400, "stream", "valid boolean"),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", WRONG)
def test_what_is_illegal_is_told(server, route, case):
  change, wanted, param, says = WRONG[case]
  status, _, made = send(f"{server.url}{route}", ROUTES[route] | change)
  assert (status, made["error"]["type"]) == (wanted, "invalid_request_error")
  assert made["error"]["param"].partition(".")[0] == param
  assert says in made["error"]["message"]


MORE = [
  ("/v1/completions", {"prompt": "a" * 60}, "prompt", "13 more than the 48"),
  ("/v1/completions", {"prompt": 5}, "prompt", "valid string"),
  ("/v1/completions", {"prompt": []}, "prompt", "at least 1 item"),
  ("/v1/completions", {"prompt": [[400]]}, "prompt", "outside the vocabulary"),
  ("/v1/completions", {"prompt": [257]}, "prompt", "mask token"),
  ("/v1/completions", {"prompt": "\ud800"}, "prompt", "surrogate"),
  ("/v1/completions", {"\ud800": 1}, None, "JSON object"),
  ("/v1/completions", {"infill": "[MASK*2] a"}, "prompt", "beside infill"),
  (
    "/v1/completions",
    {"infill": "a", "prompt": None, "max_tokens": None},
    "infill",
    "no mask span",
  ),
  (
    "/v1/completions",
    {"infill": "[MASK*" + "9" * 5000, "prompt": None, "max_tokens": None},
    "infill",
    "999999951 more than the 48",
  ),
  ("/v1/completions", {"prompt": ["a"] * 5}, "prompt", "at most 4"),
  (
    "/v1/completions",
    {"echo": True, "logprobs": 1, "suffix": "a"},
    "suffix",
    "left to right",
  ),
  ("/v1/completions", {"max_tokens": 0}, "max_tokens", "echo with logprobs"),
  (
    "/v1/completions",
    {"max_tokens": 0, "echo": True},
    "max_tokens",
    "echo with logprobs",
  ),
  (
    "/v1/completions",
    {"echo": True, "logprobs": 0, "max_tokens": 0, "prompt": "a" * 60},
    "prompt",
    "12 more than the 48",
  ),
  ("/v1/chat/completions", {"max_tokens": 0}, "max_tokens", "equal to 1"),
  ("/v1/chat/completions", {"messages": []}, "messages", "at least 1 item"),
  (
    "/v1/chat/completions",
    {"messages": [{"role": "king", "content": ""}]},
    "messages.0.role",
    "system",
  ),
  (
    "/v1/chat/completions",
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    "messages.0.content.0.type",
    "text",
  ),
  ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs", "logprobs"),
  (
    "/v1/chat/completions",
    {"response_format": {"type": "xml"}},
    "response_format",
    "json_schema",
  ),
  (
    "/v1/chat/completions",
    {"max_completion_tokens": 3},
    "max_tokens",
    "newer name",
  ),
  ("/v1/completions", {"logprobs": 3}, "logprobs", "--top_logprobs"),
  ("/v1/completions", {"threshold": 0.5}, "threshold", "fast_dllm"),
  ("/v1/completions", {"steps": 9}, "steps", "at most 8"),
  ("/v1/completions", {"preset": "dream"}, "preset", "'llada'"),
  ("/v1/completions", {"block_length": 9}, "block_length", "as 8"),
  ("/v1/completions", {"logit_bias": {"999": 1}}, "logit_bias", "vocabulary"),
  ("/tokenize", {}, "prompt", "one of them"),
  ("/detokenize", {"tokens": [999]}, "tokens", "outside the vocabulary"),
]


@pytest.mark.parametrize(("route", "change", "param", "says"), MORE)
def test_what_else_is_illegal(server, route, change, param, says):
  body = ROUTES.get(route, {}) | change
  status, _, made = send(f"{server.url}{route}", body)
  assert status == 400, made
  assert made["error"]["param"] == param
  assert says in made["error"]["message"]


@pytest.mark.parametrize(
  ("data", "kind", "says"),
  [
    (b'{"model": ', None, "no JSON"),
    (b"[" * 100_000, None, "JSON"),
    (b"\xff\xfe", None, "JSON"),
    (b"[1, 2]", None, "JSON object"),
    (b"", None, "JSON object"),
    (json.dumps(COMPLETION).encode(), "text/plain", "application/json"),
  ],
)
def test_a_body_that_is_none(server, data, kind, says):
  headers = {"Content-Type": kind} if kind else None
  url = f"{server.url}/v1/completions"
  status, _, made = send(url, data=data, headers=headers)
  assert status == 400 and says in made["error"]["message"]


def test_a_body_that_is_too_long_or_too_slow(server, limits):
  url = f"{server.url}/v1/completions"
  most = limits().body_bytes
  status, _, made = send(url, COMPLETION | {"prompt": "a" * most})
  assert status == 413 and f"{most:,}" in made["error"]["message"]
  host, port = server.server.address
  with socket.create_connection((host, port), timeout=30) as slow:
    slow.sendall(
      b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n"
      b"Content-Type: application/json\r\n\r\n{"
    )
    began = time.monotonic()
    assert slow.recv(100).startswith(b"HTTP/1.1 408")
    assert time.monotonic() - began < limits().body_seconds + 2


def test_other_routes(server):
  get = lambda path: send(f"{server.url}{path}")
  status, _, made = get("/v1/models")
  (model,) = made["data"]
  assert status == 200 and model["id"] == NAME and model["object"] == "model"
  assert get(f"/v1/models/{NAME}")[2] == model
  assert model["max_model_len"] == LENGTH
  assert get("/v1/models/other")[0] == 404
  assert get("/nowhere")[2]["error"]["message"].startswith("there is no such")
  assert get("/v1/completions")[0] == 405
  assert get("/health")[::2] == (200, {"status": "ready"})
  text = "naïve"
  _, _, made = send(f"{server.url}/tokenize", {"prompt": text})
  assert bytes(made["tokens"]).decode() == text and made["count"] == 6
  _, _, made = send(f"{server.url}/detokenize", {"tokens": made["tokens"]})
  assert made == {"prompt": text}
  assert "/v1/completions" in get("/openapi.json")[2]["paths"]


def test_metrics_count(server):
  def read():
    _, _, text = send(f"{server.url}/metrics")
    lines = [
      line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#"
    ]
    return {name: float(value) for name, value in lines}

  before = read()
  send(f"{server.url}/v1/completions", COMPLETION)
  send(f"{server.url}/v1/completions", COMPLETION | {"n": 0})
  after = read()
  route = 'dllm_requests_total{route="/v1/completions",status="%d"}'
  for status in (200, 400):
    name = route % status
    assert after[name] == before.get(name, 0) + 1
  for name in (
    "dllm_request_seconds_count",
    "dllm_time_to_first_token_seconds_count",
    "dllm_calls_per_token_count",
  ):
    assert after[name] == before.get(name, 0) + 1
  assert (
    after["dllm_prompt_tokens_total"] == before["dllm_prompt_tokens_total"] + 6
  )
  assert after["dllm_slots"] == SLOTS and after["dllm_slots_running"] == 0


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl(server):
  done = subprocess.run(
    [
      *("curl", "-sS", "--fail-with-body", f"{server.url}/v1/completions"),
      *("-H", "Content-Type: application/json"),
      *("-d", json.dumps(COMPLETION)),
    ],
    capture_output=True,
    text=True,
    check=True,
    timeout=60,
  )
  made = json.loads(done.stdout)
  assert made["choices"][0]["text"] == server.text("ROMEO:", 16, seed=SEED)

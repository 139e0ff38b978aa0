"""The routes: OpenAI's, those of tokens, and what people and machines look at.

`application(model)` is an ASGI application; `server` runs it. What is legal is
said by `protocol` and `wishes`, what goes back by `forms` and `stream`.
"""

import base64
from collections.abc import Sequence
import functools
import hashlib
import json
import time
from typing import Any

import fastapi
from fastapi import exceptions, responses
from starlette import concurrency
from starlette.exceptions import HTTPException

from dllm_jax.core.paths import Path
from dllm_jax.evaluation.likelihood.reading import Reading
from dllm_jax.serving import decisions, description
from dllm_jax.serving.http import prompts, protocol, wishes
from dllm_jax.serving.http.forms import Chats, Completions, Form
from dllm_jax.serving.http.gate import Gate
from dllm_jax.serving.http.limits import Refusal
from dllm_jax.serving.http.metrics import Metrics
from dllm_jax.serving.http.model import Model
from dllm_jax.serving.http.stream import (
  Answers,
  attended,
  Deadline,
  EventStream,
  Gone,
  timely,
  whole,
)
from dllm_jax.serving.http.wishes import Wishes

_REFUSED = {
  "4XX": {"model": protocol.Failure, "description": "What was wrong."},
  "5XX": {"model": protocol.Failure, "description": "Not served, or failed."},
}
_NO_JSON = "the body is no JSON: send one JSON object"
# The page runs its own script and no other, loads nothing from elsewhere, and
# nobody may frame it.
_PAGE_POLICY = (
  "default-src 'none'; connect-src 'self'; script-src {script}; style-src {style}; "
  "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Routes:
  """What answers requests about a model.

  Args:
    model: what is served.
    metrics: what counts.
  """

  def __init__(self, model: Model, metrics: Metrics):
    self._model, self._metrics = model, metrics
    self.draining = lambda: False

  async def completions(
    self, body: protocol.Completion, request: fastapi.Request
  ):
    """Continues a prompt, or fills what is left open in a text."""
    wanted = await self._wanted(body, wishes.completion)
    form = Completions(self._model, wanted.logprobs)
    return await self._answer(wanted, form, request)

  async def chats(self, body: protocol.Chat, request: fastapi.Request):
    """Answers a conversation."""
    wanted = await self._wanted(body, wishes.chat)
    form = Chats(self._model, wanted.logprobs)
    return await self._answer(wanted, form, request)

  async def _wanted(self, body: protocol.Common, read: Any) -> Wishes:
    wishes.known(body.model, self._model)
    # Long texts take a while to encode, and others want to be served meanwhile.
    return await concurrency.run_in_threadpool(read, body, self._model)

  async def _answer(
    self, wanted: Wishes, form: Form, request: fastapi.Request
  ) -> responses.Response:
    since, route = time.monotonic(), request.url.path
    deadline = Deadline(since, self._model.limits.seconds)
    try:
      readings = await self._read(wanted, request, deadline)
      answers = Answers(
        wanted, self._model, self._metrics.retry_after, readings
      )
      answers.submit()

      def ended(status: int) -> None:
        self._metrics.answered(route, status)
        if status == 200:
          self._metrics.took(answers.answers, since)

      if wanted.stream:
        return EventStream(answers, form, deadline, ended)
      async with attended(answers, request.receive, deadline):
        made = await whole(answers, form)
    except Gone:
      self._metrics.answered(route, 499)
      return responses.Response(status_code=499)  # nobody reads it
    ended(200)
    return responses.JSONResponse(made)

  async def _read(
    self, wanted: Wishes, request: fastapi.Request, deadline: Deadline
  ) -> Sequence[Reading]:
    """Returns what the network holds of each prompt, where that is asked for."""
    if not wanted.reads:
      return ()

    async def look() -> None:
      if await request.is_disconnected():
        raise Gone

    prompts = [wish.before for wish in wanted.answers[:: wanted.n]]
    async with timely(deadline):
      return await self._model.readings(prompts, look)

  async def decisions(self, body: decisions.Decision) -> dict[str, Any]:
    """Answers questions about an input by labels, in one network call."""
    wishes.known(body.model, self._model)
    length = self._model.length
    off = concurrency.run_in_threadpool
    layout = await off(self._model.decider.layout, body, length)
    answers = await off(self._model.decider, layout)
    self._metrics.answered("/v1/decisions", 200)
    return decisions.response(body, layout, answers)

  async def models(self) -> dict[str, Any]:
    """Lists what is served: one model."""
    return {"object": "list", "data": [self._described()]}

  async def one_model(self, name: str) -> dict[str, Any]:
    """Describes the model that is served."""
    wishes.known(name, self._model)
    return self._described()

  def _described(self) -> dict[str, Any]:
    return {
      "id": self._model.name,
      "object": "model",
      "created": self._model.created,
      "owned_by": "dllm_jax",
      "max_model_len": self._model.length,
      "chat": bool(getattr(self._model.tokenizer, "chat_templates", None)),
      "infill": self._model.sees_suffix,
      "preset": self._model.sampler.preset,
      "sampler": self._model.settings,
    }

  def tokenizer_info(self) -> dict[str, str | None]:
    """Returns the names of special tokens and the chat template, or null."""
    tokenizer = self._model.tokenizer
    name = lambda i: None if i is None else tokenizer.decode([i], special=True)
    templates = getattr(tokenizer, "chat_templates", {})
    roles = ("bos", "eos", "pad")
    named = {f"{r}_token": name(getattr(tokenizer, f"{r}_id")) for r in roles}
    return named | {"chat_template": templates.get("default")}

  def tokenize(self, body: protocol.Tokenize) -> dict[str, Any]:
    """Returns the token ids of a prompt, or of messages."""
    wishes.known(body.model, self._model)
    if (body.prompt is None) == (body.messages is None):
      raise Refusal("give prompt or messages, one of them", param="prompt")
    if body.messages is not None:
      tokens = prompts.conversation(body.messages, self._model)
    elif body.add_special_tokens is False:
      tokens = prompts.text_ids(body.prompt, self._model)
    else:
      tokens = prompts.prompt_ids(body.prompt, self._model)
    length = self._model.length
    return {"count": len(tokens), "max_model_len": length, "tokens": tokens}

  def detokenize(self, body: protocol.Detokenize) -> dict[str, str]:
    """Returns the text of token ids."""
    wishes.known(body.model, self._model)
    tokens = prompts.checked(body.tokens, self._model, "tokens")
    return {"prompt": self._model.tokenizer.decode(tokens)}

  async def health(self) -> responses.JSONResponse:
    """Says whether requests are answered: 200, or 503 while it starts or ends."""
    if self.draining():
      return responses.JSONResponse({"status": "draining"}, 503)
    if not self._model.engine.ready:
      return responses.JSONResponse({"status": "starting"}, 503)
    return responses.JSONResponse({"status": "ready"})

  async def metrics(self):
    """Counts and times for Prometheus."""
    return responses.PlainTextResponse(
      self._metrics.text(), media_type="text/plain; version=0.0.4"
    )

  async def page(self) -> responses.HTMLResponse:
    """A page that talks to the model and shows how its answers come about."""
    text, headers = _page()
    return responses.HTMLResponse(text, headers=headers)

  async def docs(self, request: fastapi.Request) -> responses.HTMLResponse:
    """What the server takes, as a page."""
    text = description.page(request.app.openapi())
    return responses.HTMLResponse(text, headers=_headers(text))


def application(model: Model, *, key: str | None = None) -> Gate:
  """Returns the server of a model, as an ASGI application.

  Args:
    model: what is served.
    key: what clients have to know; None for nothing.
  """
  metrics = Metrics(model.engine)
  routes = Routes(model, metrics)
  app = fastapi.FastAPI(
    title="dllm serve",
    version="1",
    description="A diffusion language model behind OpenAI's conventions.",
    responses=_REFUSED,
    # FastAPI's have browsers load scripts from elsewhere.
    docs_url=None,
    redoc_url=None,
  )
  post = functools.partial(app.add_api_route, methods=["POST"])
  get = functools.partial(app.add_api_route, methods=["GET"])
  post("/v1/completions", routes.completions, response_model=None)
  post("/v1/chat/completions", routes.chats, response_model=None)
  post("/v1/decisions", routes.decisions, response_model=None)
  get("/v1/models", routes.models)
  get("/v1/models/{name}", routes.one_model)
  get("/tokenizer_info", routes.tokenizer_info)
  post("/tokenize", routes.tokenize)
  post("/detokenize", routes.detokenize)
  get("/health", routes.health, response_model=None)
  get("/metrics", routes.metrics, response_class=responses.PlainTextResponse)
  shown = {"response_class": responses.HTMLResponse, "include_in_schema": False}
  get("/", routes.page, **shown)
  get("/docs", routes.docs, **shown)
  refused = functools.partial(_refused, metrics)
  app.add_exception_handler(Refusal, refused)
  app.add_exception_handler(exceptions.RequestValidationError, refused)
  app.add_exception_handler(HTTPException, refused)
  app.add_exception_handler(Exception, refused)
  ready = lambda: model.engine.ready
  gate = Gate(app, model.limits, key=key, ready=ready, refused=metrics.answered)
  routes.draining = lambda: gate.draining
  return gate


async def _refused(
  metrics: Metrics, request: fastapi.Request, error: Exception
) -> responses.Response:
  """Answers what went wrong, without a word of where in the program."""
  refusal = _as_refusal(error)
  metrics.answered(request.url.path, refusal.status)
  return responses.Response(
    json.dumps(refusal.body()),
    refusal.status,
    headers=dict(refusal.headers),
    media_type="application/json",
  )


def _as_refusal(error: Exception) -> Refusal:
  if isinstance(error, Refusal):
    return error
  if isinstance(error, exceptions.RequestValidationError):
    return illegal(error.errors())
  if isinstance(error, HTTPException):
    text = {
      400: _NO_JSON,
      404: "there is no such route; GET /openapi.json lists them",
    }
    message = text.get(error.status_code, str(error.detail))
    return Refusal(
      message, status=error.status_code, headers=error.headers or {}
    )
  return Refusal(
    "something went wrong in the server; its log says what", status=500
  )


def illegal(errors: Any) -> Refusal:
  """Returns the refusal of a body that is not what it should be.

  Args:
    errors: pydantic's; the first field that is wrong is told.
  """
  # Of the types that a part may have, the one that fits best goes deepest.
  first = max(errors, key=lambda error: len(_field(error["loc"]) or ""))
  kind, place = first["type"], first["loc"]
  if kind == "json_invalid":
    return Refusal(_NO_JSON)
  param = _field(place)
  if param is None:
    return Refusal(
      "the body must be a JSON object, sent with content-type application/json"
    )
  if kind == "extra_forbidden":
    return Refusal(
      f"unknown field {param!r}: nothing is accepted and ignored; GET /docs "
      "lists what is known",
      param=param,
      code="unknown_parameter",
    )
  if kind == "missing":
    return Refusal(f"{param} must be given", param=param, code="missing")
  said = [e["msg"] for e in errors if _field(e["loc"]) == param]
  reasons = " or ".join(
    dict.fromkeys(text[:1].lower() + text[1:] for text in said)
  )
  return Refusal(f"{param}: {reasons}", param=param, code="invalid_value")


def _field(place: Any) -> str | None:
  """Returns the name of a field, as its body has it; None for the whole body.

  What is wrong inside of messages has a place there.
  """
  names = [part for part in place[1:] if not _branch(part)]
  names = (
    names if names[:1] in (["messages"], ["response_format"]) else names[:1]
  )
  return ".".join(str(part)[:80] for part in names) or None


def _branch(part: Any) -> bool:
  """Whether a part of a place is one of the types that a field may have."""
  return isinstance(part, str) and (
    part in ("str", "int", "bool") or "[" in part or "constrained" in part
  )


@functools.cache
def _page() -> tuple[str, dict[str, str]]:
  """Returns the page and the headers that it is sent with."""
  file = Path(__file__).parent.parent / "page.html"
  text = file.read_text(encoding="utf-8")
  return text, _headers(text)


def _headers(page: str) -> dict[str, str]:
  """Returns what a page is sent with, by which it can load nothing."""
  allowed = {tag: _digest(page, tag) for tag in ("script", "style")}
  return {
    "Content-Security-Policy": _PAGE_POLICY.format(**allowed),
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
  }


def _digest(page: str, tag: str) -> str:
  """Returns by what a policy knows the one element of a tag in a page."""
  text = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
  digest = base64.b64encode(hashlib.sha256(text.encode()).digest())
  return f"'sha256-{digest.decode()}'"

"""From bodies to rows of the engine: tokens, options, and what a model can do.

A body of n answers to each of several prompts becomes as many requests; their
numbers count up, as `dllm sample --num_samples=n` counts, so that an answer is
that of the offline sampler for the same seed.
"""

from collections.abc import Sequence
import dataclasses
import re
import secrets
from typing import Any

from dllm_jax.sampling import infill
from dllm_jax.sampling.constraints.automaton import Automaton
from dllm_jax.sampling.options import RowOptions
from dllm_jax.serving.http import protocol
from dllm_jax.serving.http.limits import Refusal
from dllm_jax.serving.http.model import Model
from dllm_jax.serving.http.prompts import (
  checked,
  conversation,
  encoded,
  filled,
  prompt_ids,
  room_after,
)
from dllm_jax.serving.languages import automaton
from dllm_jax.serving.requests import Request

# Fields of a body that are choices of its rows.
_CHOSEN = (
  "temperature",
  "top_k",
  "top_p",
  "min_p",
  "threshold",
  "steps",
  "repetition_penalty",
  "presence_penalty",
  "frequency_penalty",
  "min_tokens",
  "seed",
)
_GAPS = re.compile(r"\[MASK\*([0-9]+)")
_COMPLETION = 16  # tokens of a completion where a body does not say: OpenAI's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
  """One answer that is wanted.

  Attributes:
    request: the engine's; None where nothing is to be written.
    head: text that is put before what is written.
    tail: text that is put after it.
    before: token ids before what is written, of one text with it.
    last: the last slot whose text belongs to the answer.
  """

  request: Request | None
  head: str = ""
  tail: str = ""
  before: Sequence[int] = ()
  last: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wishes:
  """What one body asks for.

  Attributes:
    answers: one for each choice, in order.
    n: of them, those of one prompt.
    stops: strings of which the first ends an answer.
    logprobs: None for none, or how many of the best tokens beside each.
    reads: whether those of the prompts are wanted, too.
    stream: whether text is sent as it becomes final.
    drafts: whether the canvas is sent, too.
    usage: whether a stream ends with what it cost.
  """

  answers: Sequence[Wish]
  n: int = 1
  stops: Sequence[str] = ()
  logprobs: int | None = None
  reads: bool = False
  stream: bool = False
  drafts: bool = False
  usage: bool = False


def completion(body: protocol.Completion, model: Model) -> Wishes:
  """Returns what a completion's body asks for.

  Raises:
    Refusal: the model cannot do it, or a limit is passed.
  """
  reads = bool(body.echo) and body.logprobs is not None
  if body.max_tokens == 0 and not reads:
    raise Refusal(
      "max_tokens=0 writes nothing, which is for echo with logprobs: give both, "
      "or ask for at least 1",
      param="max_tokens",
    )
  if reads:
    _check_read(body, model)
  prompts = _prompts(body.prompt)
  _few(body, len(prompts), model)
  if body.infill is not None:
    rows = [_infilled(body, model)]
  else:
    rows = [_row(body, given, model) for given in prompts]
  return _wishes(body, rows, model, logprobs=body.logprobs, reads=reads)


def _check_read(body: protocol.Completion, model: Model) -> None:
  """Raises Refusal unless the prompts of a body can be read."""
  if body.suffix:
    raise Refusal(
      "echo with logprobs reads a prompt from left to right, and no suffix: "
      "leave out suffix, echo or logprobs",
      param="suffix",
    )
  model.readings.check()


def chat(body: protocol.Chat, model: Model) -> Wishes:
  """Returns what a chat's body asks for.

  Raises:
    Refusal: the model has no chat template, or it refuses the messages.
  """
  if body.max_tokens is not None and body.max_completion_tokens is not None:
    raise Refusal(
      "max_completion_tokens is the newer name of max_tokens: give one",
      param="max_tokens",
    )
  if body.top_logprobs is not None and not body.logprobs:
    raise Refusal(
      "top_logprobs wants logprobs: give logprobs=true", param="top_logprobs"
    )
  _few(body, 1, model)
  prompt = conversation(body.messages, model)
  wanted, param = body.max_tokens, "max_tokens"
  if body.max_completion_tokens is not None:
    wanted, param = body.max_completion_tokens, "max_completion_tokens"
  room = room_after(prompt, 0, model, "messages")
  row = _Row(template=filled(prompt, wanted, room, param, model))
  logprobs = (body.top_logprobs or 0) if body.logprobs else None
  return _wishes(body, [row], model, logprobs=logprobs)


def known(name: str | None, model: Model) -> None:
  """Raises Refusal unless a name is the model's."""
  if name not in (None, model.name):
    raise Refusal(
      f"there is no model {name[:80]!r} here; legal: {model.name!r}",
      status=404,
      param="model",
      code="model_not_found",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
  """A template and what of it is shown."""

  template: Sequence[int | None]
  head: str = ""
  tail: str = ""
  before: Sequence[int] = ()
  last: int | None = None


def _prompts(prompt: Any) -> list[str | list[int]]:
  """Returns the prompts of a body, one by one."""
  if prompt is None:
    return [""]
  if isinstance(prompt, str) or isinstance(prompt[0], int):
    return [prompt]
  return list(prompt)


def _few(body: protocol.Common, prompts: int, model: Model) -> None:
  """Raises Refusal if more answers are asked for than one request may have."""
  n, most = body.n or 1, model.limits.choices
  if n * prompts > most:
    raise Refusal(
      f"n={n} answers to {prompts} prompts are {n * prompts}: at most {most} in "
      "one request",
      param="n" if n > 1 else "prompt",
    )


def _row(
  body: protocol.Completion, given: str | list[int], model: Model
) -> _Row:
  """Returns the row of a prompt, with its suffix."""
  text = isinstance(given, str)
  prompt = prompt_ids(given, model) if text else checked(given, model, "prompt")
  if not text and model.tokenizer.mask_id in prompt:
    raise Refusal(
      f"prompt has the mask token {model.tokenizer.mask_id}: it is no text; use "
      "infill, with [MASK*n] where n tokens are wanted",
      param="prompt",
    )
  shown = {"before": prompt}
  if body.echo:
    shown["head"] = given if text else model.tokenizer.decode(given)
  if not body.suffix:
    wanted = _COMPLETION if body.max_tokens is None else body.max_tokens
    room = room_after(prompt, 0, model, "prompt", least=min(wanted, 1))
    wanted = min(wanted, room) if body.max_tokens is None else wanted
    template = filled(prompt, wanted, room, "max_tokens", model)
    return _Row(template=template, **shown)
  _sees_suffix(model, "suffix")
  if body.echo:
    shown["tail"] = body.suffix
  spans = model.tokenizer.encode_spans
  parts = [given, 1, body.suffix] if text else [1, body.suffix]
  around = encoded(lambda: spans(parts), "suffix")
  before = around[: around.index(None)] if text else prompt
  after = around[around.index(None) + 1 :]
  room = room_after(before, len(after), model, "prompt")
  wanted = _COMPLETION if body.max_tokens is None else body.max_tokens
  template = filled(before, wanted, room, "max_tokens", model) + after
  shown["before"] = before
  return _Row(template=template, last=len(before) + wanted - 1, **shown)


def _infilled(body: protocol.Completion, model: Model) -> _Row:
  """Returns the row of an infill template, whose answer is the whole text."""
  for name in ("prompt", "suffix", "max_tokens", "echo"):
    if getattr(body, name):
      raise Refusal(
        f"{name} beside infill: the template says what is given and how much is "
        "wanted",
        param=name,
      )
  _sees_suffix(model, "infill")
  # Before as many slots are made: a number may have any length.
  asked = sum(int(n[:9]) for n in _GAPS.findall(body.infill))
  if asked > model.length:
    raise Refusal(
      f"infill asks for {asked} tokens or more, {asked - model.length} more than "
      f"the {model.length} of this model",
      param="infill",
      code="context_length_exceeded",
    )
  template = encoded(
    lambda: infill.parse(body.infill, model.tokenizer), "infill"
  )
  before = template[: template.index(None)]
  room_after(template, 0, model, "infill", least=0)
  head = model.tokenizer.decode(before)
  last = len(template) - 1
  return _Row(template=template, before=before, head=head, last=last)


def _sees_suffix(model: Model, param: str) -> None:
  if not model.sees_suffix:
    raise Refusal(
      f"{param}: this model writes from left to right and does not see what "
      "follows; give a prompt alone",
      param=param,
    )


def _wishes(
  body: protocol.Common,
  rows: Sequence[_Row],
  model: Model,
  *,
  logprobs: int | None,
  reads: bool = False,
) -> Wishes:
  """Returns the answers that rows and the rest of a body ask for."""
  _check(body, model)
  most = model.engine.sampler.policy.top
  if logprobs and logprobs > most:
    completion_ = isinstance(body, protocol.Completion)
    raise Refusal(
      f"this server keeps the {most} best tokens beside each: ask for no more, "
      "or start another with a higher --top_logprobs",
      param="logprobs" if completion_ else "top_logprobs",
    )
  n = body.n or 1
  options = _options(body, automaton(body, model.tokenizer))
  drafts = bool(body.stream_drafts)
  answers = [
    Wish(
      request=Request(
        template=tuple(row.template),
        options=options,
        number=number,
        drafts=drafts,
      )
      if None in row.template
      else None,
      head=row.head,
      tail=row.tail,
      before=row.before,
      last=len(row.template) - 1 if row.last is None else row.last,
    )
    for number, row in enumerate(row for row in rows for _ in range(n))
  ]
  for answer in answers[::n]:
    if answer.request is not None:
      _legal(answer.request, model)
  stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
  return Wishes(
    answers=answers,
    n=n,
    stops=stop,
    logprobs=logprobs,
    reads=reads,
    stream=bool(body.stream),
    drafts=drafts,
    usage=bool(body.stream_options and body.stream_options.include_usage),
  )


def _options(body: protocol.Common, language: Automaton | None) -> RowOptions:
  """Returns what a body chooses of how its rows are sampled."""
  given = {name: getattr(body, name) for name in _CHOSEN}
  if body.logit_bias:
    given["logit_bias"] = {int(i): by for i, by in body.logit_bias.items()}
  if body.seed is None:
    given["seed"] = secrets.randbits(32)
  return RowOptions(**given, language=language)


def _legal(request: Request, model: Model) -> None:
  """Raises Refusal unless the engine takes a request."""
  try:
    model.engine.check(request)
  except ValueError as error:
    name = str(error).partition(" ")[0]
    param = name if name in (*_CHOSEN, "logit_bias") else None
    raise Refusal(str(error), param=param) from error


def _check(body: protocol.Common, model: Model) -> None:
  """Raises Refusal if a body contradicts itself, or wants what is not served."""
  for name in ("stream_options", "stream_drafts"):
    if getattr(body, name) and not body.stream:
      raise Refusal(f"{name} wants a stream: give stream=true", param=name)
  served = model.engine.sampler
  block = served.block_length or served.length
  for name, held in (
    ("preset", model.sampler.preset),
    ("block_length", block),
  ):
    if getattr(body, name) not in (None, held):
      raise Refusal(
        f"{name} is compiled into this server, as {held!r}: leave it out, or "
        f"start another with --sampler.{name}",
        param=name,
      )

"""Responses as OpenAI's clients read them: whole, and in chunks."""

import abc
from collections.abc import Sequence
import math
import time
from typing import Any
import uuid

from dllm_jax.sampling.constraints.spelling import Spelling, spelling
from dllm_jax.serving.http.answer import Answer, Piece, Token
from dllm_jax.serving.http.model import Model
from dllm_jax.serving.requests import Draft

_LEAST = -9999.0  # what JSON has instead of a logarithm of nothing


class Form(abc.ABC):
  """What a response looks like; one for each request.

  Args:
    model: what writes.
    top: how many of the best tokens stand beside each; None for no
      log-probabilities.

  Attributes:
    id: of the response.
  """

  kind = chunk_kind = prefix = ""

  def __init__(self, model: Model, top: int | None):
    self.id = f"{self.prefix}-{uuid.uuid4().hex}"
    self._model, self._top = model, top
    self._created = int(time.time())
    self._spelling = spelling(model.tokenizer)

  def _named(self, kind: str, **fields: Any) -> dict[str, Any]:
    return {
      "id": self.id,
      "object": kind,
      "created": self._created,
      "model": self._model.name,
    } | fields

  def chunk(self, choices: Sequence[Any], **fields: Any) -> dict[str, Any]:
    """Returns a chunk of a stream."""
    return self._named(self.chunk_kind, choices=choices, **fields)

  def draft(self, index: int, draft: Draft) -> dict[str, Any]:
    """Returns the canvas of a choice, as `stream` says."""
    text = lambda i: None if i is None else self._spelling.text_of(i)
    slots = [
      {"text": text(token), "p": None if p is None else round(math.exp(p), 4)}
      for token, p in zip(draft.tokens, draft.log_probs, strict=True)
    ]
    fields = {"index": index, "call": draft.call, "slots": slots}
    return {"id": self.id, "object": "dllm.draft", "choices": []} | fields

  def whole(
    self, pieces: Sequence[Piece], usage: dict[str, Any]
  ) -> dict[str, Any]:
    """Returns a whole response."""
    choices = [self.choice(i, piece) for i, piece in enumerate(pieces)]
    return self._named(self.kind, choices=choices, usage=usage)

  @abc.abstractmethod
  def choice(self, index: int, piece: Piece) -> dict[str, Any]:
    """Returns a whole choice."""

  @abc.abstractmethod
  def part(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
    """Returns a choice of a chunk."""


class Completions(Form):
  """`/v1/completions`."""

  kind = chunk_kind = "text_completion"
  prefix = "cmpl"

  def choice(self, index: int, piece: Piece) -> dict[str, Any]:
    """Returns a whole choice."""
    return {
      "index": index,
      "text": piece.text,
      "logprobs": self._logprobs(piece.tokens),
      "finish_reason": piece.finish,
    }

  def part(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
    """Returns a choice of a chunk."""
    return self.choice(index, piece)

  def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
    if self._top is None:
      return None
    text = self._spelling.text_of
    best = [
      None
      if t.best is None
      else {
        text(i): _finite(p)
        for i, p in [*t.best[: self._top], (t.id, t.log_prob)]
      }
      for t in tokens
    ]
    sure = [None if t.best is None else _finite(t.log_prob) for t in tokens]
    return {
      "tokens": [text(token.id) for token in tokens],
      "token_logprobs": sure,
      "top_logprobs": best if self._top else None,
      "text_offset": [token.offset for token in tokens],
    }


class Chats(Form):
  """`/v1/chat/completions`."""

  kind, chunk_kind = "chat.completion", "chat.completion.chunk"
  prefix = "chatcmpl"

  def choice(self, index: int, piece: Piece) -> dict[str, Any]:
    """Returns a whole choice."""
    message = {"role": "assistant", "content": piece.text, "refusal": None}
    return {
      "index": index,
      "message": message,
      "logprobs": self._logprobs(piece.tokens),
      "finish_reason": piece.finish,
    }

  def part(self, index: int, piece: Piece, *, first: bool) -> dict[str, Any]:
    """Returns a choice of a chunk."""
    delta = {"role": "assistant"} if first else {}
    delta |= {"content": piece.text} if piece.text or first else {}
    return {
      "index": index,
      "delta": delta,
      "logprobs": self._logprobs(piece.tokens) if piece.tokens else None,
      "finish_reason": piece.finish,
    }

  def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
    if self._top is None:
      return None
    return {
      "content": [
        _entry(self._spelling, t.id, t.log_prob)
        | {
          "top_logprobs": [
            _entry(self._spelling, i, p) for i, p in t.best[: self._top]
          ]
        }
        for t in tokens
      ],
      "refusal": None,
    }


def usage(
  answers: Sequence[Answer], n: int, *, read: int = 0
) -> dict[str, Any]:
  """Returns what answers cost together; a prompt counts once for its n.

  Args:
    answers: all of them, over.
    n: answers to each prompt.
    read: network calls that read the prompts.
  """
  costs = [answer.usage for answer in answers]
  prompt = sum(cost.prompt for cost in costs[::n])
  completion = sum(answer.tokens for answer in answers)
  return {
    "prompt_tokens": prompt,
    "completion_tokens": completion,
    "total_tokens": prompt + completion,
    "prompt_tokens_details": {
      "cached_tokens": sum(c.cached for c in costs[::n])
    },
    "network_calls": sum(cost.calls for cost in costs) + read,
  }


def _entry(
  spelling_: Spelling, token: int, log_prob: float | None
) -> dict[str, Any]:
  return {
    "token": spelling_.text_of(token),
    "logprob": _finite(log_prob),
    "bytes": list(spelling_.bytes_of(token)),
  }


def _finite(log_prob: float | None) -> float | None:
  """Returns a log-probability that JSON can hold."""
  if log_prob is None:
    return 0.0  # it was given
  return max(log_prob, _LEAST) if not math.isnan(log_prob) else _LEAST

"""Prompts as token ids, and the slots that they leave.

What a tokenizer or a template refuses is the caller's mistake, and so is what
does not fit.
"""

from collections.abc import Callable, Iterable, Sequence

from dllm_jax.sampling import requests
from dllm_jax.serving.http import protocol
from dllm_jax.serving.http.limits import Refusal
from dllm_jax.serving.http.model import Model


def conversation(
  messages: Sequence[protocol.Message], model: Model
) -> list[int]:
  """Returns the token ids of messages, by the model's own template.

  Raises:
    Refusal: there is none, or it refuses them.
  """
  if not getattr(model.tokenizer, "chat_templates", None):
    raise Refusal(
      f"the model {model.name!r} has no chat template: use /v1/completions",
      param="messages",
    )
  plain = [message.plain() for message in messages]
  return encoded(lambda: model.tokenizer.chat(plain), "messages")


def prompt_ids(text: str, model: Model) -> list[int]:
  """Returns the token ids of a prompt, as texts begin.

  Raises:
    Refusal: the tokenizer knows no such text.
  """
  return encoded(lambda: model.tokenizer.prompt(text), "prompt")


def text_ids(text: str, model: Model) -> list[int]:
  """Returns the token ids of a text by itself.

  Raises:
    Refusal: the tokenizer knows no such text.
  """
  return encoded(lambda: model.tokenizer.encode(text), "prompt")


def checked(ids: Sequence[int], model: Model, param: str) -> list[int]:
  """Returns token ids that are in the vocabulary.

  Raises:
    Refusal: one is not.
  """
  legal = range(model.tokenizer.vocab_size)
  for i in ids:
    if i not in legal:
      raise Refusal(
        f"{param} has token {i}, outside the vocabulary [0, {len(legal)})",
        param=param,
      )
  return list(ids)


def encoded(
  encode: Callable[[], Iterable[int | None]], param: str
) -> list[int | None]:
  """Returns what an encoder makes of a text, whose mistakes are the caller's."""
  try:
    return [None if i is None else int(i) for i in encode()]
  except ValueError as error:
    raise Refusal(f"{param}: {error}", param=param) from error


def room_after(
  given: Sequence[int | None],
  after: int,
  model: Model,
  param: str,
  least: int = 1,
) -> int:
  """Returns the slots that a prompt, and what follows, leave.

  Raises:
    Refusal: there is none.
  """
  slots = len(requests.begun(given or [None], model.objective)) + after
  slots -= not given
  room = model.length - slots
  if room < least:
    raise Refusal(
      f"{param} is too long: {slots} tokens, and at least {least} to write, are "
      f"{least - room} more than the {model.length} of this model",
      param=param,
      code="context_length_exceeded",
    )
  return room


def filled(
  prompt: Sequence[int],
  wanted: int | None,
  room: int,
  param: str,
  model: Model,
) -> list[int | None]:
  """Returns a prompt and the slots after it; all that there are for None."""
  wanted = room if wanted is None else wanted
  if wanted > room:
    raise Refusal(
      f"{param}={wanted} after {model.length - room} tokens are "
      f"{wanted - room} more than the {model.length} of this model: shorten the "
      f"prompt, or lower {param} to {room}",
      param=param,
      code="context_length_exceeded",
    )
  return [*prompt, *[None] * wanted]

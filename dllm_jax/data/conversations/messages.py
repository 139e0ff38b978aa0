"""Messages as chat templates read them, from the ways in which they are written.

Roles and keys have several names; a content may be a list of parts, a call's
arguments JSON in a text.
"""

from collections.abc import Mapping, Sequence
import json
from typing import Any

_KEYS = (("role", "content"), ("from", "value"))
_ROLES = {
  "human": "user", "gpt": "assistant", "chatgpt": "assistant",
  "bing": "assistant", "bard": "assistant", "model": "assistant",
  "bot": "assistant", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_CALL = "function_call"  # A role whose content is a call.


def normal(given: Any) -> list[dict[str, Any]]:
  """Returns messages of one spelling: role, content as text, calls as objects.

  Args:
    given: a list of messages, one of them, or JSON of either.

  Raises:
    ValueError: it is something else, or holds what is no text.
  """
  given = parsed(given)
  given = [given] if isinstance(given, Mapping) else given
  if not isinstance(given, Sequence) or isinstance(given, str):
    raise ValueError(f"{type(given).__name__} is no list of messages")
  return [_message(one, n) for n, one in enumerate(given, 1)]


def parsed(value: Any) -> Any:
  """Returns what JSON in a text stands for, if it is a list or an object."""
  if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
    return value
  try:
    return json.loads(value)
  except ValueError:
    return value


def _message(message: Any, number: int) -> dict[str, Any]:
  keys = next(
    (k for k in _KEYS if isinstance(message, Mapping) and k[0] in message), None
  )
  if keys is None:
    raise ValueError(
      f"message {number} must be an object with role and content, or from and "
      "value"
    )
  rest = {k: v for k, v in message.items() if k not in keys}
  role, content = (message.get(key) for key in keys)
  made = {"role": _ROLES.get(role, role), "content": _text(content, number)}
  call = parsed(content) if role == _CALL else None
  if isinstance(call, Mapping):
    made = {"role": "assistant", "content": ""}
    rest = {"tool_calls": [call]}
  if rest.get("tool_calls"):
    rest["tool_calls"] = [_call(one) for one in parsed(rest["tool_calls"])]
  return made | rest


def _text(content: Any, number: int) -> str | None:
  """Returns a content as text, parts joined."""
  if content is None or isinstance(content, str):
    return content
  if not isinstance(content, list):
    raise ValueError(
      f"the content of message {number} must be text or a list of parts, not "
      f"{type(content).__name__}"
    )
  parts = [{"text": p} if isinstance(p, str) else p for p in content]
  for part in parts:
    if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
      kind = part.get("type") if isinstance(part, Mapping) else part
      raise ValueError(
        f"message {number} has a part of type {kind!r}; only texts are trained "
        "on"
      )
  return "".join(part["text"] for part in parts)


def _call(call: Any) -> Any:
  """Returns a call with its arguments as an object, which templates write."""
  if not isinstance(call, Mapping):
    return call
  bare = "function" not in call and "name" in call
  call = {"type": "function", "function": call} if bare else dict(call)
  function = call.get("function")
  if isinstance(function, Mapping) and "arguments" in function:
    arguments = parsed(function["arguments"])
    call["function"] = dict(function) | {"arguments": arguments}
  return call

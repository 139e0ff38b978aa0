"""The form of an answer: what bodies ask for as the language of a row."""

from typing import Any

from dllm_jax.sampling.constraints.automaton import Automaton, automaton_of
from dllm_jax.sampling.constraints.language import (
  choices,
  json_object,
  json_schema,
  Language,
  regex,
)
from dllm_jax.serving.http import protocol
from dllm_jax.serving.http.limits import Refusal


def automaton(body: protocol.Common, tokenizer: Any) -> Automaton | None:
  """Returns what the answers of a body have to be in; None for any text.

  Raises:
    Refusal: a body asks for two, or for one that cannot be followed.
  """
  asked = dict(_asked(body))
  if len(asked) > 1:
    first, second = list(asked)[:2]
    raise Refusal(f"{first} beside {second}: give one", param=second)
  for param, make in asked.items():
    try:
      return automaton_of(make(), tokenizer)
    except ValueError as error:
      raise Refusal(f"{param}: {error}", param=param) from error
  return None


def _asked(body: protocol.Common):
  """Yields what a body asks for: a field, and what makes its language."""
  form = body.response_format
  if isinstance(form, protocol.AnyObject):
    yield "response_format", json_object
  elif isinstance(form, protocol.OfSchema):
    yield "response_format", lambda: json_schema(form.json_schema.schema_)
  given = body.structured_outputs or protocol.StructuredOutputs()
  if body.structured_outputs is not None and not given.model_fields_set:
    raise Refusal(
      "structured_outputs wants json, regex or choice",
      param="structured_outputs",
    )
  kinds = {"json": json_schema, "regex": regex, "choice": choices}
  for name, make in kinds.items():
    own = getattr(given, "json_" if name == "json" else name)
    older = getattr(body, f"guided_{name}")
    for param, value in (
      (f"structured_outputs.{name}", own),
      (f"guided_{name}", older),
    ):
      if value is not None:
        yield param, _made(make, value)


def _made(make: Any, value: Any) -> Any:
  def language() -> Language:
    return make(value)

  return language

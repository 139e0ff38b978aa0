"""Languages as one regular expression each, whatever they were asked for as."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import re
from typing import Any

from dllm_jax.core import paths
from dllm_jax.sampling.constraints.schema import checked

_SPACE = "[ ]?"  # where JSON allows white space
_NESTED = 2
"""Objects and arrays inside of each other where nothing says how many."""


@dataclasses.dataclass(frozen=True)
class Language:
  """A set of texts.

  Attributes:
    pattern: the regular expression that a whole text matches: that of Rust's
      `regex` crate, without look-around and back-references.
    name: what messages call it.
  """

  pattern: str
  name: str = "the expression"


def regex(pattern: str) -> Language:
  """Returns the texts that a regular expression matches whole.

  Args:
    pattern: anchors are implied; those that stand at its ends are taken off.

  Raises:
    ValueError: it is empty.
  """
  if not pattern:
    raise ValueError("a regular expression must not be empty")
  bare = pattern.removeprefix("^")
  if bare.endswith("$") and not bare.endswith("\\$"):
    bare = bare[:-1]
  return Language(bare, f"the expression {_short(pattern)}")


def choices(texts: Sequence[str]) -> Language:
  """Returns some texts and no other.

  Raises:
    ValueError: there is none, or one is empty or there twice.
  """
  texts = list(texts)
  if not texts or not all(isinstance(text, str) and text for text in texts):
    raise ValueError("choices must be texts, at least one, none of them empty")
  if len(set(texts)) < len(texts):
    raise ValueError("choices must differ from each other")
  return Language("|".join(map(_literal, texts)), "the choices")


def json_schema(schema: Mapping[str, Any] | bool | str) -> Language:
  """Returns the JSON texts that a schema admits, some of them left out.

  Keys stand in the schema's order, and where white space may stand there is at
  most one space. Objects have the properties that are named and no others.

  Args:
    schema: the schema, or its JSON.

  Raises:
    ValueError: it has a feature that is not supported, which is named.
  """
  if isinstance(schema, str):
    try:
      schema = json.loads(schema)
    except json.JSONDecodeError as error:
      raise ValueError(f"a JSON schema must be JSON: {error}") from None
  schema = checked(schema)
  try:
    made = _library().build_regex_from_schema(
      json.dumps(schema, ensure_ascii=False), _SPACE, _NESTED
    )
  except ValueError as error:
    said = str(error).split("\n")[0].strip()
    raise ValueError(f"JSON schema: {said}") from None
  return Language(made, "the JSON schema")


def json_object() -> Language:
  """Returns JSON objects, of values, and of objects and arrays of values.

  An automaton has no memory for more: each object inside of others is a copy of
  all that may stand in it.
  """
  string = r'"([^"\\\x00-\x1F\x7F]|\\["\\/bfnrt])*"'
  number = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"
  value = f"({string}|{number}|true|false|null)"
  several = lambda one: rf"({one}{_SPACE}(,{_SPACE}{one}{_SPACE})*)?"
  pairs = lambda value: several(f"{string}{_SPACE}:{_SPACE}{value}")
  inner = rf"\{{{_SPACE}{pairs(value)}\}}|\[{_SPACE}{several(value)}\]"
  deep = f"({value}|{inner})"
  return Language(rf"\{{{_SPACE}{pairs(deep)}\}}", "JSON objects")


def asked(**given: str) -> Language | None:
  """Returns the language that a command line asks for; None for none.

  Args:
    **given: what it says of each of `LANGUAGES`; "" for nothing.

  Raises:
    ValueError: it is illegal, two are asked for, or there is no such file.
  """
  named = [name for name in LANGUAGES if given[name]]
  if len(named) > 1:
    raise ValueError(
      f"sampler.{named[0]} and sampler.{named[1]} are two languages; give one"
    )
  return LANGUAGES[named[0]](given[named[0]]) if named else None


def _schema_at(text: str) -> str:
  """Returns a schema that is given, or that a file has whose place is.

  Raises:
    ValueError: there is no such file.
  """
  if text.lstrip()[:1] in ("{", "[") or text in ("true", "false"):
    return text
  try:
    return paths.place(text).read_text(encoding="utf-8")
  except OSError as error:
    raise ValueError(
      f"sampler.json_schema: {text} cannot be read ({error.strerror}); give a"
      " file or a JSON schema"
    ) from None


LANGUAGES = {
  "choices": lambda text: choices(text.split("|")),
  "regex": regex,
  "json_schema": lambda text: json_schema(_schema_at(text)),
}
"""What a sampler's configuration has, of which one may say a language.

It is made of choices with "|" between them, of an expression, of a schema or the
place of a file with one.
"""


def _literal(text: str) -> str:
  """Returns the expression that matches a text alone."""
  return "".join(
    c if c.isalnum() or ord(c) > 127 else f"\\x{{{ord(c):x}}}" for c in text
  )


def _short(text: str) -> str:
  text = re.sub(r"\s+", " ", text)
  return repr(text if len(text) <= 40 else text[:37] + "...")


def _library():
  """Returns what makes expressions of schemas.

  Raises:
    ValueError: it is not installed.
  """
  try:
    from outlines_core import json_schema as made  # noqa: PLC0415
  except ImportError:
    raise ValueError(NEEDED) from None
  return made


NEEDED = (
  "languages need the package outlines-core: pip install"
  " 'dllm_jax[constraints]'"
)

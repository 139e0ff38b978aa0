"""JSON schemas: what of them can be followed, said by name where it cannot.

The library that makes expressions of schemas leaves out what it does not know,
and would write texts that do not validate. Here every keyword is known, or
refused; a few are rewritten into others first.
"""

from collections.abc import Mapping
import json
import re
from typing import Any

_NOTES = {
  "$comment",
  "$defs",
  "$id",
  "$schema",
  "default",
  "definitions",
  "deprecated",
  "description",
  "examples",
  "readOnly",
  "title",
  "writeOnly",
}
_OF_TYPE = {
  "string": {"minLength", "maxLength", "pattern", "format"},
  "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
  "number": set(),
  "boolean": set(),
  "null": set(),
  "array": {"items", "prefixItems", "minItems", "maxItems"},
  "object": {"properties", "required", "additionalProperties"},
}
_FORMATS = {"date", "date-time", "time", "uuid"}
_MOST_NUMBERS = 1024  # of an interval of integers
_SAFE = r'"\\\x00-\x1F\x7F'
_SHORT = {"d": "0-9", "w": "0-9A-Za-z_", "s": " "}
_KINDS = {
  "string": str,
  "integer": int,
  "number": (int, float),
  "boolean": bool,
  "null": type(None),
  "array": list,
  "object": dict,
}


def checked(schema: Any, at: str = "#") -> Any:
  """Returns a schema that can be followed, the same as another.

  Args:
    schema: the schema.
    at: where it stands, for messages.

  Raises:
    ValueError: it has a feature that is not supported, or is no schema.
  """
  if schema is True:
    return {}
  if not isinstance(schema, Mapping):
    raise ValueError(
      f"JSON schema at {at}: it must be an object, not {json.dumps(schema)[:40]}"
    )
  schema = dict(schema)
  for name in ("$defs", "definitions"):
    if name in schema:
      schema[name] = _each(schema[name], f"{at}/{name}")
  keys = set(schema) - _NOTES
  for name in ("$ref", "enum", "const", "anyOf", "oneOf", "allOf"):
    if name in schema:
      return _combined(schema, name, keys, at)
  kinds = schema.get("type")
  if kinds is None:
    kinds = next((k for k, own in _OF_TYPE.items() if keys & own), None)
    if kinds is not None:
      raise ValueError(
        f"JSON schema at {at}: {sorted(keys)[0]!r} without 'type' admits values"
        f" of every other type; give type, such as {kinds!r}"
      )
    _none_but(keys, set(), at)
    return schema
  if isinstance(kinds, list):
    _none_but(keys, {"type"}.union(*(_OF_TYPE.get(k, ()) for k in kinds)), at)
    parts = [
      checked(
        {"type": k}
        | {n: schema[n] for n in _OF_TYPE.get(k, ()) if n in schema},
        at,
      )
      for k in kinds
    ]
    return _kept(schema) | {"anyOf": parts}
  if kinds not in _OF_TYPE:
    raise ValueError(
      f"JSON schema at {at}: type must be one of {', '.join(_OF_TYPE)}, not"
      f" {kinds!r}"
    )
  _none_but(keys, {"type"} | _OF_TYPE[kinds], at)
  rewrite = {
    "string": _string,
    "integer": _integer,
    "array": _array,
    "object": _object,
  }
  return rewrite.get(kinds, lambda schema, at: schema)(schema, at)


def _none_but(keys: set[str], legal: set[str], at: str) -> None:
  for key in sorted(keys - legal):
    raise ValueError(
      f"JSON schema at {at}: {key!r} is not supported"
      f"{' here' if any(key in own for own in _OF_TYPE.values()) else ''}; leave"
      " it out, or say it another way"
    )


def _kept(schema: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what is no rule of a schema, its definitions among it."""
  return {k: v for k, v in schema.items() if k in _NOTES}


def _each(parts: Any, at: str) -> Any:
  if isinstance(parts, Mapping):
    return {k: checked(v, f"{at}/{k}") for k, v in parts.items()}
  if isinstance(parts, list) and parts:
    return [checked(v, f"{at}/{i}") for i, v in enumerate(parts)]
  raise ValueError(f"JSON schema at {at}: schemas are wanted, at least one")


def _combined(schema, name, keys, at):
  """Returns a schema whose one rule is of other schemas or of values."""
  with_type = {"type"} if name in ("enum", "const") else set()
  _none_but(keys, {name} | with_type, at)
  value = schema[name]
  if name == "$ref":
    if not isinstance(value, str) or not value.startswith("#"):
      raise ValueError(
        f"JSON schema at {at}: $ref must be in the schema itself, '#/$defs/...',"
        f" not {value!r}"
      )
    return schema
  if name in ("enum", "const"):
    values = value if name == "enum" else [value]
    if not isinstance(values, list) or not values:
      raise ValueError(f"JSON schema at {at}: enum must be a list of values")
    if "type" in schema:
      kinds = schema.pop("type")
      kinds = kinds if isinstance(kinds, list) else [kinds]
      values = [v for v in values if any(_is(v, kind) for kind in kinds)]
    if not values:
      raise ValueError(f"JSON schema at {at}: no value of enum has its type")
    return _kept(schema) | {"enum": values}
  parts = _each(value, f"{at}/{name}")
  if name == "allOf" and len(parts) > 1:
    raise ValueError(
      f"JSON schema at {at}: 'allOf' of several schemas is not supported; write"
      " what they have in common as one"
    )
  if name == "oneOf":
    kinds = [part.get("type") for part in parts]
    twice = None in kinds or len(set(kinds)) < len(kinds)
    if twice or {"integer", "number"} <= set(kinds):
      raise ValueError(
        f"JSON schema at {at}: 'oneOf' of schemas that are not each of another"
        " type is not supported; write anyOf if one value cannot be of two"
      )
  name = "anyOf" if name == "oneOf" else name
  return _kept(schema) | {name: parts}


def _is(value: Any, kind: str) -> bool:
  """Returns whether a value is of a type of JSON."""
  if isinstance(value, bool):
    return kind == "boolean"
  if kind == "integer" and isinstance(value, float):
    return value.is_integer()
  return kind in _KINDS and isinstance(value, _KINDS[kind])


def _string(schema, at):
  lengths = {"minLength", "maxLength"} & set(schema)
  rules = [name for name in ("pattern", "format") if name in schema]
  if len(rules) + bool(lengths) > 1:
    raise ValueError(
      f"JSON schema at {at}: {rules[0]!r} beside"
      f" {(rules[1:] or sorted(lengths))[0]!r} is not supported; give one"
    )
  if "format" in schema and schema["format"] not in _FORMATS:
    raise ValueError(
      f"JSON schema at {at}: format {schema['format']!r} is not supported;"
      f" supported: {', '.join(sorted(_FORMATS))}"
    )
  if "pattern" in schema:
    return schema | {"pattern": _inside(schema["pattern"], at)}
  return schema


def _inside(pattern: str, at: str) -> str:
  """Returns a pattern that matches nothing that ends a JSON string.

  Raises:
    ValueError: it can, or another engine might read it another way.
  """
  wrong = lambda why: ValueError(
    f"JSON schema at {at}: pattern {pattern!r} {why}"
  )
  bare = pattern.removeprefix("^")
  bare = re.sub(r"(?<!\\)\$$", "", bare)
  if "|" in bare and len(bare) != len(pattern):
    bare = f"(?:{bare})"
  out, in_class, barred, i = [], False, False, 0
  while i < len(bare):
    c = bare[i]
    if c == "\\":
      out.append(_escaped(bare[i : i + 2], in_class, barred, wrong))
      i += 2
      continue
    if (c == '"' and not barred) or c < " ":
      raise wrong("can match a quote or a control, which is not supported")
    if not in_class and c in "^$":
      raise wrong("has an anchor inside, which is not supported")
    if not in_class and c == ".":
      c = f"[^{_SAFE}]"
    elif not in_class and c == "[":
      in_class, barred = True, bare[i : i + 2] == "[^"
      if barred:
        c, i = f"[^{_SAFE}", i + 1
    elif c == "]":
      in_class = barred = False
    elif in_class and c == "-" and not _tame(bare, i):
      raise wrong("has a range that holds a quote or a backslash")
    elif in_class and c in "[&~":  # Elsewhere a set in a set, or of two.
      c = f"\\{c}"
    out.append(c)
    i += 1
  return "^" + "".join(out) + "$"


def _escaped(escape: str, in_class: bool, barred: bool, wrong: Any) -> str:
  r"""Returns what an escape of a pattern is in a text that any engine matches.

  \d and \w of a schema are ASCII; other engines' hold as many characters as their
  version of Unicode has. What is admitted is what all of them admit, and what a
  class bars is what any of them bars.

  Args:
    escape: a backslash and what follows.
    in_class: whether it stands in a class.
    barred: whether that is of all other characters.
    wrong: an error of some text.
  """
  c = escape[1:]
  if c in ('"', "\\", *"ntrfv"):
    if barred:
      return escape
    raise wrong("can match what JSON has to escape, which is not supported")
  if c in ("", "<", ">") or (c.isalnum() and c not in "dwsp"):
    raise wrong(f"has {escape}: write a class such as [a-z]")
  if c not in _SHORT:
    return escape
  if barred:
    return escape + r"\x{FEFF}\x{85}" if c == "s" else escape
  return _SHORT[c] if in_class else f"[{_SHORT[c]}]"


def _tame(text: str, i: int) -> bool:
  """Returns whether the range around a hyphen of a class is of harmless text."""
  low, high = text[i - 1], text[i + 1 : i + 2]
  if low in "[^" or high in ("]", ""):
    return True
  if "-" in (low, high):  # Elsewhere the difference of two sets.
    return False
  return not any(low <= c <= high for c in '"\\\x7f') and low >= " "


def _integer(schema, at):
  names = _OF_TYPE["integer"] & set(schema)
  if not names:
    return schema
  low = schema.get("minimum", schema.get("exclusiveMinimum"))
  high = schema.get("maximum", schema.get("exclusiveMaximum"))
  if not (isinstance(low, int) and isinstance(high, int)):
    raise ValueError(
      f"JSON schema at {at}: {sorted(names)[0]!r} is supported with a whole"
      " number at both ends of the interval"
    )
  low += "minimum" not in schema
  high -= "maximum" not in schema
  if len(names) > 2 or not low <= high < low + _MOST_NUMBERS:
    raise ValueError(
      f"JSON schema at {at}: an interval of integers must have two ends and 1 to"
      f" {_MOST_NUMBERS} numbers, not those from {low} to {high}"
    )
  return _kept(schema) | {"enum": list(range(low, high + 1))}


def _array(schema, at):
  made = dict(schema)
  if "prefixItems" in made:
    made["prefixItems"] = _each(made["prefixItems"], f"{at}/prefixItems")
    _none_but(set(made) - _NOTES, {"type", "prefixItems"}, at)
  if "items" in made:
    made["items"] = checked(made["items"], f"{at}/items")
  return made


def _object(schema, at):
  made, more = dict(schema), schema.get("additionalProperties", True)
  names = made.get("properties", {})
  for name in made.get("required", ()):
    if name not in names:
      raise ValueError(
        f"JSON schema at {at}: {name!r} is required but not among the properties"
      )
  if names:
    # No others: what a schema admits beside those it names is left out.
    made["properties"] = _each(names, f"{at}/properties")
    made.pop("additionalProperties", None)
  elif isinstance(more, Mapping):
    made["additionalProperties"] = checked(more, f"{at}/additionalProperties")
  elif more is False:
    return _kept(schema) | {"enum": [{}]}
  return made

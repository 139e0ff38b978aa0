"""What the server takes, for people: a page made of its OpenAPI description.

Plain HTML without a script, which asks for nothing, not even of this server.
"""

from collections.abc import Iterator, Mapping
import html
import json
from typing import Any

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
code, h3 { font-family: ui-monospace, monospace; }
h3 { font-size: 1rem; margin: 2rem 0 .5rem; }
table { border-collapse: collapse; width: 100%; }
td { border-top: 1px solid #8885; padding: .3rem .6rem .3rem 0;
  vertical-align: top; }
"""
_BOUNDS = (
  ("minimum", "from {}"),
  ("exclusiveMinimum", "above {}"),
  ("maximum", "to {}"),
  ("exclusiveMaximum", "below {}"),
  ("minLength", "of {} characters or more"),
  ("maxLength", "of at most {} characters"),
  ("minItems", "of {} or more"),
  ("maxItems", "of at most {}"),
)
_REF = "#/components/schemas/"


def page(described: Mapping[str, Any]) -> str:
  """Returns the page.

  Args:
    described: an OpenAPI description.
  """
  schemas = described.get("components", {}).get("schemas", {})
  routes, names = [], []
  for path, methods in described["paths"].items():
    for method, route in methods.items():
      routes.append(f"<h3>{method.upper()} {_text(path)}</h3>")
      routes.append(f"<p>{_text(route.get('description', ''))}</p>")
      for body in _refs(route.get("requestBody", {})):
        routes.append(f"<p>Body: {_link(body)}</p>")
        names += [n for n in _reached(body, schemas) if n not in names]
  types = [line for name in names for line in _type(name, schemas[name])]
  info = described["info"]
  return (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width">'
    f"<title>{_text(info['title'])}</title><style>{_STYLE}</style>"
    f"<h1>{_text(info['title'])}</h1><p>{_text(info['description'])} For "
    'programs: <a href="openapi.json">openapi.json</a>.</p>'
    f"<h2>Routes</h2>{''.join(routes)}<h2>Bodies</h2>{''.join(types)}</html>"
  )


def _type(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
  """Yields what an object's fields are."""
  yield f'<h3 id="{_text(name)}">{_text(name)}</h3>'
  yield f"<p>{_text(schema.get('description', ''))}</p><table>"
  needed = schema.get("required", ())
  for field, of in schema.get("properties", {}).items():
    must = ", must be given" if field in needed else ""
    told = _text(of.get("description", ""))
    yield (
      f"<tr><td><code>{_text(field)}</code><td>{_kind(of)}{must}<td>{told}</tr>"
    )
  yield "</table>"


def _kind(schema: Any) -> str:
  """Returns the type of a value and its bounds, as HTML."""
  if not isinstance(schema, Mapping):
    return "any"
  if "$ref" in schema:
    return _link(schema["$ref"].removeprefix(_REF))
  for key in ("anyOf", "oneOf"):
    if key in schema:
      some = [x for x in schema[key] if x.get("type") != "null"]
      return " or ".join(map(_kind, some))
  if "const" in schema or "enum" in schema:
    legal = schema.get("enum", [schema.get("const")])
    return " or ".join(f"<code>{_text(json.dumps(x))}</code>" for x in legal)
  kind = _text(schema.get("type", "any"))
  if kind == "array":
    kind = f"array of ({_kind(schema.get('items'))})"
  # JSON has whole numbers as fractions, too.
  number = lambda x: int(x) if float(x).is_integer() else x
  bounds = [
    text.format(number(schema[k])) for k, text in _BOUNDS if k in schema
  ]
  return " ".join((kind, *map(_text, bounds)))


def _reached(name: str, schemas: Mapping[str, Any]) -> list[str]:
  """Returns an object and those that its fields are of, the first ones first."""
  found, left = [], [name]
  while left:
    name = left.pop(0)
    if name not in found:
      found.append(name)
      left += _refs(schemas[name])
  return found


def _refs(node: Any) -> list[str]:
  """Returns the names of objects that are anywhere in a description's part."""
  if isinstance(node, Mapping):
    own = [node["$ref"].removeprefix(_REF)] if "$ref" in node else []
    return own + [name for value in node.values() for name in _refs(value)]
  if isinstance(node, list):
    return [name for value in node for name in _refs(value)]
  return []


def _link(name: str) -> str:
  return f'<a href="#{_text(name)}">{_text(name)}</a>'


def _text(text: Any) -> str:
  return html.escape(str(text))

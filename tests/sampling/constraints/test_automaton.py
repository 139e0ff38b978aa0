"""Automata beside `re` and `jsonschema`: every text that they write is legal."""

import itertools
import json
import re

import jsonschema
import numpy as np
import pytest

from dllm_jax.data.tokenizer import Bytes, characters, Numbers
from dllm_jax.sampling.constraints import automaton as automata
from dllm_jax.sampling.constraints.arrays import fits, Room, Span
from dllm_jax.sampling.constraints.automaton import automaton_of, compiled
from dllm_jax.sampling.constraints.language import (
  choices,
  json_object,
  json_schema,
  regex,
)

TOKENS = [b"a", b"b", b"ab", b"ba", b"1", b".", b"1.", b""]
END = 7
PATTERNS = (
  "(ab)+b?",
  r"1+(\.1+)?",
  "a(ba)*b|b{2,3}",
  "(a|b)*1",
  "[^1.]{1,3}",
  "a?b?a?b?",
)
VOCABULARY = [bytes([i]) for i in range(256)] + [
  b'{"', b'": ', b'":', b'", "', b'"}', b"true", b"null", b"12", b"e+", b'["',
  "é".encode(), "日本".encode(), b"",
]  # fmt: skip
STOP = len(VOCABULARY) - 1
SCHEMAS = (
  {"type": "string"},
  {"type": "number"},
  {"type": "integer"},
  {"type": "integer", "minimum": -3, "exclusiveMaximum": 12},
  {"type": ["boolean", "null"]},
  {"enum": ["red", 5, None, 'a"b']},
  {"const": {"a": [1, 2]}},
  {"type": "string", "maxLength": 4, "minLength": 2},
  {"type": "string", "pattern": r"^[a-z]+\.\d{2}.$"},
  {"type": "string", "format": "date"},
  {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
  {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}]},
  {"anyOf": [{"type": "integer"}, {"type": "boolean"}]},
  {"oneOf": [{"type": "integer"}, {"type": "string"}]},
  {
    "type": "object",
    "properties": {
      "name": {"type": "string"},
      "a.b (c)": {"$ref": "#/$defs/size"},
      "tags": {"type": "array", "items": {"enum": ["x", "y"]}},
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"size": {"type": "number"}},
  },
  {"type": "object", "additionalProperties": {"type": "integer"}},
)


def table(made):
  """Returns {(state, class): next} of an automaton."""
  of = {}
  for group, kind in made.members.tolist():
    of.setdefault(group, []).append(kind)
  return {
    (source, kind): to
    for source, group, to in made.arcs.tolist()
    for kind in of[group]
  }


def accepts(made, tokens):
  steps, state = table(made), 0
  for token in tokens:
    state = steps.get((state, int(made.classes[token])), -1)
    if state < 0:
      return False
  return bool(made.accepting[state])


def walks(made, count, *, longest=60, seed=0):
  """Returns texts of random ways to states that accept."""
  steps, rng = table(made), np.random.default_rng(seed)
  out, kinds = (
    {},
    [np.flatnonzero(made.classes == k) for k in range(made.kinds)],
  )
  for (source, kind), to in steps.items():
    if made.ended not in (source, to):
      out.setdefault(source, []).append((kind, to))
  far = np.full(made.states, 10**6)
  far[made.accepting] = 0
  for _ in range(made.states):
    for (source, _), to in steps.items():
      far[source] = min(far[source], far[to] + 1)
    if (far < 10**6).all():
      break
  texts = []
  for _ in range(count):
    state, tokens = 0, []
    while len(tokens) < longest or not made.accepting[state]:
      if made.accepting[state] and (rng.random() < 0.3 or state not in out):
        break
      ways = out[state]
      if len(tokens) > longest // 2:  # the shortest way out
        ways = [min(ways, key=lambda way: far[way[1]])]
      kind, state = ways[rng.integers(len(ways))]
      tokens.append(int(rng.choice(kinds[kind])))
    texts.append(tokens)
  return texts


@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_automaton_accepts_what_the_expression_matches(pattern):
  made = compiled(pattern, TOKENS, [END])
  for length in range(5):
    for tokens in itertools.product(range(7), repeat=length):
      text = b"".join(TOKENS[t] for t in tokens).decode()
      legal = bool(re.fullmatch(pattern, text))
      assert accepts(made, tokens) == legal, text
      assert accepts(made, (*tokens, END, END)) == legal
  assert not accepts(made, (END, 0))


def test_a_language_of_the_empty_text_alone():
  made = compiled("é?", TOKENS, [END])
  assert accepts(made, ()) and accepts(made, (END,))
  assert not any(accepts(made, (token,)) for token in range(7))
  assert made.shortest == 0


def test_tokens_that_nothing_tells_apart_are_one_class():
  made = compiled("[a-z]+", [bytes([i]) for i in range(97, 123)] + [b"1"])
  assert (made.kinds, made.sets, len(made.arcs), made.ended) == (2, 1, 2, -1)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda s: json.dumps(s)[:40])
def test_what_a_schema_writes_validates(schema):
  made = compiled(json_schema(schema).pattern, VOCABULARY, [STOP])
  for tokens in walks(made, 8):
    text = b"".join(VOCABULARY[t] for t in tokens).decode()
    jsonschema.validate(json.loads(text), schema)


def test_any_object_is_json():
  made = compiled(json_object().pattern, VOCABULARY, [STOP])
  for tokens in walks(made, 4):
    text = b"".join(VOCABULARY[t] for t in tokens).decode()
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
  "pattern, legal, others",
  [
    (r"^\d$", "3", "a٣"),
    (r"^[\w]$", "a_9", "é٣"),
    (r"^[^\d]$", "aé", "3٣"),
    (r"^[^\s]$", "aé", "\xa0\u2003\ufeff\x85"),
    (r'^[^"\\\n]$', "a[", '"'),
    ("^[a&&b~~c]$", "a&b~c", "d"),
    ("^[^a[b]$", "c&", "a[b"),
  ],
)
def test_patterns_are_read_as_schemas_mean_them(pattern, legal, others):
  """Also where other engines, or versions of Unicode, read them otherwise."""
  schema = {"type": "string", "pattern": pattern}
  made = compiled(json_schema(schema).pattern, VOCABULARY)
  written = lambda c: accepts(made, f'"{c}"'.encode())
  assert all(map(written, legal)) and not any(map(written, others))
  for c in legal:
    jsonschema.validate(c, schema)


@pytest.mark.parametrize(
  "schema, named",
  [
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"type": "number", "minimum": 0}, "minimum"),
    ({"type": "integer", "minimum": 0}, "minimum"),
    ({"type": "object", "patternProperties": {}}, "patternProperties"),
    ({"type": "string", "format": "email"}, "email"),
    ({"type": "string", "pattern": 'a"b'}, "quote"),
    ({"type": "string", "pattern": "a\\Wb"}, "class"),
    ({"type": "string", "pattern": "a\\ab"}, "class"),
    ({"type": "string", "pattern": "a\nb"}, "control"),
    ({"type": "string", "pattern": "(a$|b)]"}, "anchor"),
    ({"type": "string", "pattern": "[a--b]"}, "range"),
    ({"type": "string", "pattern": "[!-~]"}, "range"),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"allOf": [{"type": "integer"}, {"type": "number"}]}, "allOf"),
    ({"not": {}}, "not"),
    ({"minLength": 3}, "type"),
    ({"type": "object", "properties": {}, "required": ["a"]}, "required"),
    ({"$ref": "http://x/y"}, "ref"),
    ("[1,", "JSON"),
    (3, "object"),
  ],
)
def test_what_a_schema_cannot_have_is_named(schema, named):
  with pytest.raises(ValueError, match=named) as error:
    json_schema(schema)
  assert "\n" not in str(error.value)


def test_languages_that_cannot_be_are_told():
  with pytest.raises(ValueError, match="cannot write any text"):
    compiled("é+", TOKENS[:7])
  for pattern in ("(ab", "a(?=b)", "(a)\\1"):
    with pytest.raises(ValueError, match="look-around"):
      compiled(pattern, TOKENS)
  for wrong in ([], ["a", "a"], [""]):
    with pytest.raises(ValueError, match="choices"):
      choices(wrong)
  with pytest.raises(ValueError, match="tokenizer.json"):
    automaton_of(regex("a"), Numbers(vocab_size=9, mask_id=8))


def test_rows_without_a_text_are_told_the_shortest():
  made = compiled("(ab){3}", TOKENS, [END])
  free = [None] * 2
  for room, legal in ((2, False), (3, True), (9, True)):
    row = [5, *[None] * room]
    if legal:
      fits(made, row, Span.of(row))
    else:
      with pytest.raises(ValueError, match="shortest has 3 tokens"):
        fits(made, row, Span.of(row))
  row = [*free, 0, *free, *free]
  fits(made, row, Span.of(row))  # "..a.." may hold
  row = [*free, 4, *free]
  with pytest.raises(ValueError, match="given between"):
    fits(made, row, Span.of(row))
  row = [*[None] * 7, 5]  # something follows: no end of text
  with pytest.raises(ValueError, match="exactly 7"):
    fits(made, row, Span.of(row))
  with pytest.raises(ValueError, match="room"):
    Room().check(made)


def test_an_automaton_is_kept_on_disk(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  first = automaton_of(choices(["red", "blue"]), Bytes())
  with monkeypatch.context() as patch:
    patch.setattr(automata, "compiled", lambda *a, **k: 1 / 0)
    again = automaton_of(choices(["red", "blue"]), Bytes())
    with pytest.raises(ZeroDivisionError):
      automaton_of(choices(["red", "blue"]), characters(["red blue"]))
  for name in ("classes", "members", "arcs", "accepting", "ended"):
    np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
  assert accepts(again, Bytes().encode("blue").tolist())
  assert (again.shortest, again.end_ids) == (3, ())

"""Fifty languages, every preset that reveals: what comes out parses and validates.

The judges are `jsonschema` and `re`; the networks are random, nearly even and sure.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest

from dllm_jax.core.types import Process
from dllm_jax.data.huggingface import HuggingFace
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.sampling.constraints.arrays import placed
from dllm_jax.sampling.constraints.automaton import compiled
from dllm_jax.sampling.constraints.language import json_schema
from dllm_jax.sampling.constraints.spelling import spelling
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.sampling.program import generate
from dllm_jax.sampling.requests import build, text_ids
from tests import toys
from tests.serving import servers

LENGTH, EACH = 40, 10
BLOCKS = (
  "llada",
  "llada_random",
  "dream",
  "dream_margin",
  "fast_dllm",
  "entropy_bound",
)
WHOLE = ("mdlm", "psi", "remdm", "mask_predict")
pytestmark = pytest.mark.all


def letters() -> HuggingFace:
  return servers.letters()


def schemas(rng):
  """Returns 25 random schemas whose shortest text has less than 30 bytes."""
  scalar = lambda: [
    {"type": "integer"},
    {"type": "number"},
    {"type": "boolean"},
    {"type": "string", "maxLength": 5},
    {"enum": ["a", 1, None]},
    {"type": "integer", "minimum": 0, "maximum": 20},
    {"type": "string", "pattern": "^[a-c]+$"},
  ][rng.integers(7)]
  found = []
  for i in range(25):
    one = scalar()
    if i % 3 == 1:
      one = {"type": "array", "items": one, "maxItems": int(rng.integers(1, 4))}
    elif i % 3 == 2:
      names = "ab"[: rng.integers(1, 3)]
      one = {
        "type": "object",
        "properties": {name: scalar() for name in names},
        "required": list(names[:1]),
      }
    found.append(one)
  return found


def expressions(rng):
  """Returns 25 random regular expressions."""
  atom = lambda: ["[a-f]", "x", "[0-9]", "(ab)", "é", "[^0-9]", "(no|yes)"][
    rng.integers(7)
  ]
  times = lambda: ["", "+", "?", "*", "{2,4}"][rng.integers(5)]
  part = lambda: atom() + times()
  many = lambda: "".join(part() for _ in range(rng.integers(1, 4)))
  return [f"({many()}|{many()})-{many()}" for _ in range(25)]


@functools.cache
def languages():
  """Returns 50 (judge, automaton)."""
  rng, tokens = np.random.default_rng(7), spelling(letters()).written()
  made = lambda pattern: compiled(pattern, tokens, letters().end_ids)

  def judge_of(schema):
    return lambda text: jsonschema.validate(json.loads(text), schema)

  def match(pattern):
    def judge(text):
      assert re.fullmatch(pattern, text, re.DOTALL), (pattern, text)

    return judge

  found = [(judge_of(s), made(json_schema(s).pattern)) for s in schemas(rng)]
  return found + [(match(e), made(e)) for e in expressions(rng)]


@functools.cache
def batch(objective):
  rows = [[None] * LENGTH] * (50 * EACH)
  automata = [a for _, a in languages() for _ in range(EACH)]
  placed_ = placed(
    rows,
    automata,
    spans=[None] * len(rows),
    vocab=objective.vocab_size,
    length=LENGTH,
  )
  return build(rows, objective=objective, length=LENGTH, languages=placed_)


@pytest.mark.parametrize("sharpness", [1.0, 30.0])
@pytest.mark.parametrize("preset", BLOCKS + WHOLE)
def test_all_texts_validate(preset, sharpness):
  tokenizer = letters()
  objective = MDLM(vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id)
  blocks = {"block_length": 8, "steps": 4, "cache": "none"}
  fields = blocks if preset in BLOCKS else {"steps": 8}
  config = SamplerConfig(preset=preset, regex="any", **fields)
  sampler = config.build(objective, length=LENGTH, end_ids=tokenizer.end_ids)
  sampler.check_languages()
  denoiser = toys.mixer(objective.vocab_size, 16)
  requests = batch(objective)
  inputs = objective.inputs(
    Process(), requests.tokens, jnp.ones((len(requests.tokens), 1)), _rows()
  )
  params = denoiser.init(jax.random.key(1), inputs)
  params = jax.tree.map(lambda x: x * sharpness**0.5, params)
  out = jax.jit(lambda p: generate(
    sampler, denoiser, p, Process(), jax.random.key(0), requests
  ))(params)  # fmt: skip
  tokens = np.asarray(out.tokens).tolist()
  judges = [judge for judge, _ in languages() for _ in range(EACH)]
  for judge, row in zip(judges, tokens, strict=True):
    ids = text_ids(row, [None] * LENGTH, tokenizer.end_ids)
    judge(b"".join(spelling(tokenizer).bytes_of(i) for i in ids).decode())


def _rows():
  from dllm_jax.core.types import Batch

  shape = (50 * EACH, LENGTH)
  ones = np.ones(shape, np.int32)
  return Batch(
    tokens=ones, loss_mask=ones > 0, segment_ids=ones, positions=ones
  )

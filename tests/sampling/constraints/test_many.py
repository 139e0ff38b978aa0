"""Fifty languages, every preset that reveals: what comes out parses and validates.

The judges are `jsonschema` and `re`; the networks are random, nearly even and sure,
and one that was trained on texts of JSON.
"""

import functools
import json
import re

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import optax
import pytest

from dllm_jax.core.types import Batch, Process
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


@functools.cache
def program(preset):
  """Returns a sampler as a compiled function of parameters."""
  tokenizer = letters()
  objective = MDLM(vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id)
  blocks = {"block_length": 8, "steps": 4, "cache": "none"}
  fields = blocks if preset in BLOCKS else {"steps": 8}
  config = SamplerConfig(preset=preset, regex="any", **fields)
  sampler = config.build(objective, length=LENGTH, end_ids=tokenizer.end_ids)
  sampler.check_languages()
  denoiser = toys.mixer(objective.vocab_size, 16)
  run = jax.jit(functools.partial(generate, sampler, denoiser))
  requests, key = batch(objective), jax.random.key(0)
  return lambda params: run(params, Process(), key, requests)


@functools.cache
def networks():
  """Returns parameters by what is said of the network."""
  denoiser = toys.mixer(letters().vocab_size, 16)
  params = denoiser.init(jax.random.key(1), None)
  sharp = jax.tree.map(lambda x: x * 30**0.5, params)
  return {"even": params, "sure": sharp, "trained": trained(denoiser, params)}


def trained(denoiser, params, steps=200):
  """Returns parameters after some steps on texts of JSON, each with its end."""
  tokenizer, rng = letters(), np.random.default_rng(0)
  objective = MDLM(vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id)
  made = np.full((64, LENGTH), tokenizer.eos_id, np.int32)
  for row in made:
    some = rng.integers(0, 99, rng.integers(1, 4)).tolist()
    text = [{"a": some[0], "b": "abc"}, some, [True, "no"], some[0]][
      rng.integers(4)
    ]
    ids = tokenizer.encode(json.dumps(text))
    row[: len(ids)] = ids
  ones = np.ones(made.shape, np.int32)
  texts = Batch(
    tokens=made,
    loss_mask=ones > 0,
    segment_ids=ones,
    positions=np.broadcast_to(np.arange(LENGTH, dtype=np.int32), made.shape),
  )
  adam = optax.adam(1e-2)

  def loss(params, key, step):
    drawn = objective.draw(Process(), key, texts, step=step)
    denoise = lambda inputs: denoiser.apply(params, inputs, None)[0]
    found = objective.loss(Process(), denoise, drawn, texts, step=step)
    return found.total / found.weight

  def update(carry, step):
    params, state = carry
    key = jax.random.fold_in(jax.random.key(2), step)
    cost, slopes = jax.value_and_grad(loss)(params, key, step)
    change, state = adam.update(slopes, state)
    return (optax.apply_updates(params, change), state), cost

  start, count = (params, adam.init(params)), jnp.arange(steps)
  (params, _), costs = jax.jit(lambda x: jax.lax.scan(update, x, count))(start)
  assert costs[-20:].mean() < 0.5 * costs[0]
  return params


# All of a preset one after another: they share its program.
@pytest.mark.parametrize("network", ["even", "sure", "trained"])
@pytest.mark.parametrize("preset", BLOCKS + WHOLE)
def test_all_texts_validate(preset, network):
  out = program(preset)(networks()[network])
  tokens = np.asarray(out.tokens).tolist()
  tokenizer = letters()
  judges = [judge for judge, _ in languages() for _ in range(EACH)]
  for judge, row in zip(judges, tokens, strict=True):
    ids = text_ids(row, [None] * LENGTH, tokenizer.end_ids)
    judge(b"".join(spelling(tokenizer).bytes_of(i) for i in ids).decode())

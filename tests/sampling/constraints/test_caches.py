"""Languages beside caches, and under guidance of the prompt."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.objectives.llada import LLaDA
from dllm_jax.sampling.constraints import arrays
from dllm_jax.sampling.constraints.automaton import compiled
from dllm_jax.sampling.policies.guidance import Guidance
from dllm_jax.sampling.policies.processors import Temperature
from dllm_jax.sampling.policies.selection import Threshold
from dllm_jax.sampling.policies.unmasking import Unmasking
from dllm_jax.sampling.requests import build
from dllm_jax.sampling.sampler import Sampler
from tests.quick import long
from tests.sampling import small
from tests.sampling.constraints import tiny

# Letters, two pairs of them, the end of a text and the mask.
TEXTS = [b"%c" % c for c in b"abcdefghijklmnop"] + [b"ab", b"cd", b"", b""]
END = 18
PATTERNS = ("([a-d]{2}[e-h])*", "(ab|ba|cd)+p?", None, "[^a-c]*p")
LLADA = LLaDA(**small.TOKENS)
GUIDED = Guidance(scale=1.5)
PREFIX = {"cache": "prefix", "block_length": 4}
DUAL = PREFIX | {"cache": "dual"}
BLOCK = {"cache": "block", "block_length": 4}
CASES = {
  "dual": (small.MDLM_, DUAL),
  "dual, refreshed": (small.MDLM_, DUAL | {"refresh": 2}),
  "prefix": (small.MDLM_, PREFIX),
  "dual, shifted": (small.DREAM, DUAL),
  "block": (small.BLOCKS, BLOCK | {"blocks_from": "start"}),
  "block, extended": (LLADA, BLOCK | {"extend": True}),
  "guided": (small.MDLM_, {"guidance": GUIDED, "block_length": 4}),
  "guided, dual": (small.MDLM_, DUAL | {"guidance": GUIDED}),
  "guided, block": (
    small.BLOCKS,
    BLOCK | {"blocks_from": "start", "guidance": GUIDED},
  ),
}


def requests(objective):
  """Ragged prompts, each with a language of its own for what follows."""
  rng, rows = np.random.default_rng(3), []
  for i in range(12):
    prompt = rng.integers(0, END, 1 + i % 7).tolist()
    rows.append([*prompt, *[None] * int(rng.integers(9, 18))])
  patterns = [PATTERNS[i % len(PATTERNS)] for i in range(len(rows))]
  made = {p: compiled(p, TEXTS, [END]) for p in PATTERNS if p}
  languages = arrays.placed(
    rows,
    [made.get(p) for p in patterns],
    spans=[None] * len(rows),
    vocab=small.VOCAB,
    length=small.LENGTH,
  )
  batch = build(
    rows, objective=objective, length=small.LENGTH, languages=languages
  )
  return batch, rows, patterns


def policy(objective, *, cold=False):
  return Unmasking(
    objective=objective,
    steps=4,
    selection=Threshold(value=0.4),
    processors=(Temperature(0.0),) if cold else (),
  )


def sampler(name, *, cold=False, **fields):
  objective, own = CASES[name]
  return Sampler(
    policy=policy(objective, cold=cold),
    length=small.LENGTH,
    **{"end_ids": (END,)} | own | fields,
  )


def check(tokens, rows, patterns):
  """Asserts that what follows each prompt is in the row's language."""
  for row, pattern, tokens in zip(rows, patterns, tokens.tolist(), strict=True):
    new = tokens[row.index(None) : len(row)]
    assert pattern is None or accepted(pattern, new), (pattern, new)


def accepted(pattern, tokens):
  """Whether what follows a prompt is a text, and after its end only ends."""
  count = tokens.index(END) if END in tokens else len(tokens)
  text = b"".join(TEXTS[t] for t in tokens[:count]).decode()
  ends = all(t == END for t in tokens[count:])
  return ends and small.MASK not in tokens and re.fullmatch(pattern, text)


@pytest.mark.all
@pytest.mark.parametrize("name", CASES)
def test_texts_are_in_their_language(name):
  batch, rows, patterns = requests(CASES[name][0])
  out = small.sample(sampler(name), batch)
  check(out.tokens, rows, patterns)


@pytest.mark.parametrize(
  "cold, guidance", [(False, None), long(True, None), long(False, GUIDED)]
)
@pytest.mark.all
def test_an_exact_cache_changes_no_text(cold, guidance):
  """Drawn and greedy texts, rows without a language among them."""
  batch, rows, patterns = requests(small.BLOCKS)
  made = sampler("block", cold=cold, guidance=guidance)
  kept = small.sample(made, batch)
  check(kept.tokens, rows, patterns)
  anew = small.sample(dataclasses.replace(made, cache="none"), batch)
  np.testing.assert_array_equal(kept.tokens, anew.tokens)
  np.testing.assert_allclose(kept.log_prob, anew.log_prob, atol=1e-3)
  assert (kept.function_evaluations > anew.function_evaluations).any()


@pytest.mark.all
def test_guidance_chooses_the_best_text_of_the_joint_law():
  """Of one call: p_c^(w + 1) / p_u^w in each slot, by brute force."""
  rng, differ = np.random.default_rng(0), 0
  pattern, rows = "(ab)*b?|b+a?", [[0, None, None, None]]
  batch = tiny.requests([pattern], rows)
  made = Sampler(
    policy=Unmasking(objective=tiny.M, steps=1, processors=(Temperature(0.0),)),
    length=tiny.LENGTH,
    end_ids=(tiny.END,),
    guidance=GUIDED,
  )
  run = jax.jit(
    lambda p: tiny.generate(
      made, tiny.NETWORK, p, tiny.Process(), jax.random.key(0), batch
    )
  )
  legal = np.array([
    s[0] == 0 and tiny.accepts(pattern, s[1:]) for s in tiny.SEQUENCES
  ])
  for _ in range(20):
    p = rng.dirichlet(np.full(len(tiny.P), 0.3))
    with_it, without = (
      np.log(np.maximum(tiny.product_law(p, known)[1], 1e-30))
      for known in ([(0, 0)], ())
    )
    score = lambda law: np.where(
      legal, sum(law[i][tiny.SEQUENCES[:, i]] for i in (1, 2, 3)), -np.inf
    )
    w = GUIDED.scale
    best = score((w + 1) * with_it - w * without).argmax()
    differ += best != score(with_it).argmax()
    found = run(jnp.array(p, jnp.float32)).tokens[0]
    assert found.tolist() == tiny.SEQUENCES[best].tolist()
  assert differ > 3

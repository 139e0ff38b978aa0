"""Languages over three letters, an exact network of them, and what should come."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax.core.types import Process
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.sampling.constraints import arrays
from dllm_jax.sampling.constraints.automaton import compiled
from dllm_jax.sampling.program import generate, Sampler
from dllm_jax.sampling.requests import build
from tests import toys

END, MASK, LENGTH = 3, 4, 4
TOKENS = [b"a", b"b", b"ab", b"", b""]
M = MDLM(vocab_size=5, mask_id=MASK)
SEQUENCES, P = toys.joint(3, tokens=4, length=LENGTH)
NETWORK = toys.tabular(4, LENGTH, mask_id=MASK)


def language(pattern):
  return compiled(pattern, TOKENS, [END])


def accepts(pattern, sequence):
  """Whether tokens are a text of the language, then only ends of text."""
  sequence = list(sequence)
  text = list(itertools.takewhile(lambda t: t != END, sequence))
  if any(t != END for t in sequence[len(text) :]) or MASK in sequence:
    return False
  return bool(re.fullmatch(pattern.encode(), b"".join(TOKENS[t] for t in text)))


def product_law(p=P, known=()):
  """The law of all sequences if slots were independent, given some tokens."""
  weight = p * np.all(
    [SEQUENCES[:, i] == t for i, t in known] or [np.ones(len(p), bool)], axis=0
  )
  weight = weight / weight.sum()
  at = [
    [weight[SEQUENCES[:, i] == t].sum() for t in range(4)]
    for i in range(LENGTH)
  ]
  law = np.prod([np.array(at[i])[SEQUENCES[:, i]] for i in range(LENGTH)], 0)
  return law, np.array(at)


def conditional(pattern, law):
  legal = np.array([accepts(pattern, s) for s in SEQUENCES])
  law = np.where(legal, law, 0.0)
  return law / law.sum()


def requests(patterns, rows=None, spans=None):
  """Requests of one pattern a row; None for none."""
  rows = rows or [[None] * LENGTH] * len(patterns)
  made = {p: language(p) for p in set(patterns) if p is not None}
  placed = arrays.placed(
    rows,
    [made.get(p) for p in patterns],
    spans=spans or [None] * len(rows),
    vocab=5,
    length=LENGTH,
  )
  return build(rows, objective=M, length=LENGTH, languages=placed)


def repeated(batch, count):
  """The first row of a batch, many times, under numbers of their own."""
  batch = jax.tree.map(lambda x: jnp.repeat(x[:1], count, axis=0), batch)
  return batch.replace(request=jnp.arange(count))


def sample(policy, batch, *, key=0, p=P, **fields):
  sampler = Sampler(policy=policy, length=LENGTH, end_ids=(END,), **fields)
  run = jax.jit(lambda *args: generate(sampler, NETWORK, *args))
  return run(jnp.array(p, jnp.float32), Process(), jax.random.key(key), batch)


def frequency(tokens):
  index = np.asarray(tokens) @ 4 ** np.arange(LENGTH - 1, -1, -1)
  return np.bincount(index, minlength=len(P)) / len(tokens)

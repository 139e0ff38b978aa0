"""A small random network, random requests for it, and their samples."""

import functools

import jax
import numpy as np

from dllm_jax.core.types import Batch, Process
from dllm_jax.models.transformer import transformer, TransformerConfig
from dllm_jax.objectives.autoregressive import Autoregressive
from dllm_jax.objectives.bd3lm import BD3LM
from dllm_jax.objectives.dream import Dream
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.sampling.policies.selection import Threshold
from dllm_jax.sampling.policies.unmasking import Unmasking
from dllm_jax.sampling.program import generate, Sampler
from dllm_jax.sampling.requests import build, continuation
from tests.sampling import published

VOCAB, MASK, LENGTH = 20, 19, 24
TOKENS = {"vocab_size": VOCAB, "mask_id": MASK}
KEY = jax.random.key(5)
MDLM_ = MDLM(**TOKENS)
DREAM = Dream(**TOKENS)
BLOCKS = BD3LM(**TOKENS, length=LENGTH, block_size=4)
TIMED = BD3LM(**TOKENS, length=LENGTH, block_size=4, time_conditioning=True)
AUTOREGRESSIVE = Autoregressive(**TOKENS, bos_id=0)


@functools.cache
def network(conditioned=False, classes=0, **fields):
  """Returns a random transformer whose logits are far apart."""
  config = TransformerConfig(
    vocab_size=VOCAB,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    conditioned=conditioned,
    num_classes=classes,
    **fields,
  )
  denoiser = transformer(config)
  inputs = MDLM_.inputs(
    None, np.zeros((1, 4), np.int32), np.ones((1, 1), np.float32), _batch()
  )
  params = jax.jit(denoiser.init)(jax.random.key(1), inputs)
  # Fresh networks are nearly constant: larger weights make slots matter.
  rng = np.random.default_rng(2)
  normal = lambda x: rng.normal(scale=0.3, size=x.shape).astype(np.float32)
  params = jax.tree.map(lambda x: 2 * np.asarray(x) + normal(x), params)
  return denoiser, params


def _batch():
  ones = np.ones((1, 4), np.int32)
  return Batch(
    tokens=ones, loss_mask=ones > 0, segment_ids=ones, positions=ones
  )


def ragged(objective, length=LENGTH, seed=0, rows=4):
  """Random prompts, budgets and infilled tokens; with a first token each."""
  rng = np.random.default_rng(seed)
  made = []
  for _ in range(rows):
    prompt = rng.integers(1, MASK, rng.integers(1, 9)).tolist()
    new = int(rng.integers(5, LENGTH - len(prompt) + 1))
    row = continuation(prompt, length=LENGTH, new_tokens=new)
    for slot in range(len(prompt) + 2, len(row)):
      if rng.random() < 0.1:
        row[slot] = int(rng.integers(1, MASK))
    made.append(row)
  request = rng.permutation(100)[:rows]
  return build(made, objective=objective, length=length, request=request)


def sample(spec, requests, net=None, trace=False):
  denoiser, params = net or network()
  args = params, Process(), KEY, requests
  return published.quick(spec, denoiser, *args, trace=trace)


def program(spec, requests):
  """Returns the jaxpr of a sampler, as text."""
  denoiser, params = network()
  run = functools.partial(generate, spec, denoiser)
  return str(jax.make_jaxpr(run)(params, Process(), KEY, requests))


def rows(requests, index):
  return jax.tree.map(lambda x: x[np.asarray(index)], requests)


def confidence(objective, steps, **fields):
  return Unmasking(objective=objective, steps=steps, **fields)


def dual(objective, **fields):
  policy = confidence(objective, 4, selection=Threshold(value=0.4))
  return Sampler(policy=policy, length=LENGTH, block_length=4, **fields)

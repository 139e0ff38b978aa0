"""Measuring the vocabulary loss against the dense computation it replaces.

Loss and gradients for hidden states and the unembedding, four ways: `dense`
builds all logits; `supervised` is `cross_entropy` with every position counted;
`masked` the same with every second one; `reduce` the generic reduction, whose
logits are formed again in the backward pass.
"""

from collections.abc import Callable
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax.core import vocabulary
from dllm_jax.core.types import ModelOutputs
from dllm_jax.parallel import compilation


def _dense(hidden, unembed, targets, weights):
  logits = hidden @ unembed
  terms = jax.nn.logsumexp(logits, axis=-1)
  terms -= jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  return jnp.sum(weights * terms)


def _fused(hidden, unembed, targets, weights):
  out = ModelOutputs(hidden=hidden, unembed=unembed)
  return vocabulary.cross_entropy(out, targets, weights)[0]


def _reduced(hidden, unembed, targets, weights):
  def terms(logits, targets):
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked

  out = ModelOutputs(hidden=hidden, unembed=unembed)
  return jnp.sum(weights * vocabulary.reduce(terms, out, targets))


def loss(
  *,
  vocab: int = 126_464,
  length: int = 4096,
  width: int = 512,
  rounds: int = 5,
) -> dict[str, Any]:
  """Returns time and memory of the loss as parts of the dense computation's.

  Args:
    vocab: tokens; LLaDA's by default.
    length: positions of the one row.
    width: features of a position.
    rounds: rounds in which the four programs take turns; the median counts.

  Returns:
    `dense_seconds`, and as ratios to the dense computation of the same round:
    `supervised_time`, `masked_time`, `reduce_time` and, from the compiler's plan
    of memory beyond arguments and gradients, `memory` and `reduce_memory`.
  """
  keys = jax.random.split(jax.random.key(0), 3)
  hidden = jax.random.normal(keys[0], (1, length, width))
  unembed = jax.random.normal(keys[1], (width, vocab)) * width**-0.5
  targets = jax.random.randint(keys[2], (1, length), 0, vocab)
  ones = jnp.ones((1, length), jnp.float32)
  half = (jnp.arange(length) % 2).astype(jnp.float32)[None]

  def compiled(fn: Callable) -> Callable:
    run = compilation.jit(jax.value_and_grad(fn, argnums=(0, 1)))
    return run.lower(hidden, unembed, targets, ones).compile()

  dense, fused, reduced = map(compiled, (_dense, _fused, _reduced))
  programs = {
    "dense": (dense, ones),
    "supervised": (fused, ones),
    "masked": (fused, half),
    "reduce": (reduced, ones),
  }
  seconds = {name: [] for name in programs}
  for _ in range(rounds):
    for name, (run, weights) in programs.items():
      start = time.perf_counter()
      jax.block_until_ready(run(hidden, unembed, targets, weights))
      seconds[name].append(time.perf_counter() - start)
  ratio = lambda name: float(
    np.median(np.divide(seconds[name], seconds["dense"]))
  )
  planned = lambda run: run.memory_analysis().temp_size_in_bytes
  return {
    "vocab": vocab,
    "length": length,
    "width": width,
    "dense_seconds": float(np.median(seconds["dense"])),
    "supervised_time": ratio("supervised"),
    "masked_time": ratio("masked"),
    "reduce_time": ratio("reduce"),
    "dense_bytes": planned(dense),
    "memory": planned(fused) / planned(dense),
    "reduce_memory": planned(reduced) / planned(dense),
    "device": jax.devices()[0].device_kind,
  }

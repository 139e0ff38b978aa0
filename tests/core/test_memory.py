"""The loss's memory, as the compiler plans it."""

import jax
import jax.numpy as jnp

from dllm_jax.core.types import ModelOutputs
from dllm_jax.core.vocabulary import cross_entropy


def test_memory_does_not_grow_with_positions_times_vocabulary():
  """Twice the positions: the extra memory is a sliver of their logits."""
  vocab, width = 30_000, 16

  def planned(length):
    def loss(hidden, unembed, targets):
      out = ModelOutputs(hidden=hidden, unembed=unembed)
      return cross_entropy(out, targets, jnp.ones(targets.shape))[0]

    f32 = jax.ShapeDtypeStruct
    compiled = (
      jax
      .jit(jax.grad(loss, argnums=(0, 1)))
      .lower(
        f32((1, length, width), jnp.float32),
        f32((width, vocab), jnp.float32),
        f32((1, length), jnp.int32),
      )
      .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes

  logits = 4 * 1024 * vocab
  assert planned(2048) - planned(1024) < 0.02 * logits
  # One chunk's logits and their gradient, and the gradient of the unembedding.
  assert planned(1024) < 2 * 4 * (256 * vocab) + 2 * 4 * width * vocab

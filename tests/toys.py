"""Denoisers that are exact or tiny, for tests that need no real network."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax.core.types import Denoiser, ModelOutputs


def joint(key: int, tokens: int, length: int, *, sharpness: float = 1.5):
  """Returns (sequences [N, L], probabilities [N]) of a random joint law."""
  sequences = np.array(list(itertools.product(range(tokens), repeat=length)))
  logits = np.random.default_rng(key).normal(size=len(sequences)) * sharpness
  p = np.exp(logits)
  return sequences, p / p.sum()


def tabular(tokens: int, length: int, *, mask_id: int) -> Denoiser:
  """Returns the denoiser that knows a joint law exactly.

  Its parameters are the probabilities of all sequences in lexicographic order;
  its logits at slot i are log p(x_i | the tokens that are not masked). Slots of
  segment 0 count as unknown. The mask, the last id, gets logit 0, which a
  sampler must never take.
  """
  sequences = jnp.array(list(itertools.product(range(tokens), repeat=length)))
  one_hot = jax.nn.one_hot(sequences, tokens)  # [N, L, V]

  def apply(params, inputs, cache):
    z = inputs.latent
    unknown = (z == mask_id) | (inputs.segment_ids == 0)
    match = unknown[:, None] | (z[:, None] == sequences)
    weight = jnp.all(match, axis=-1) * params
    p = jnp.einsum("bn,nlv->blv", weight, one_hot)
    p /= jnp.sum(p, axis=-1, keepdims=True)
    logits = jnp.log(jnp.maximum(p, 1e-30))
    logits = jnp.pad(logits, ((0, 0), (0, 0), (0, 1)))
    return ModelOutputs(hidden=logits), cache

  return Denoiser(init=lambda key, inputs: None, apply=apply)


def mixer(vocab: int, width: int, *, padded: int | None = None) -> Denoiser:
  """Returns a small random network in which every visible slot sees all others.

  Args:
    vocab: real tokens, the mask included.
    width: of the hidden states.
    padded: columns of the unembedding; those from `vocab` on get a large bias.
  """
  padded = padded or vocab

  def init(key, inputs):
    del inputs
    embed, mix, unembed = jax.random.split(key, 3)
    return {
      "embed": jax.random.normal(embed, (vocab, width)),
      "mix": jax.random.normal(mix, (2 * width, width)) / width**0.5,
      "unembed": jax.random.normal(unembed, (width, padded)),
    }

  def apply(params, inputs, cache):
    here = params["embed"][inputs.latent]
    here += jnp.sin(inputs.positions[..., None] * jnp.arange(1, width + 1))
    visible = (inputs.segment_ids > 0)[..., None]
    total = jnp.sum(jnp.where(visible, here, 0.0), axis=1, keepdims=True)
    mean = total / jnp.maximum(jnp.sum(visible, axis=1, keepdims=True), 1)
    both = jnp.concatenate([here, jnp.broadcast_to(mean, here.shape)], axis=-1)
    hidden = jnp.tanh(both @ params["mix"])
    bias = jnp.where(jnp.arange(padded) < vocab, 0.0, 50.0)
    return ModelOutputs(
      hidden=hidden, unembed=params["unembed"], bias=bias, vocab_size=vocab
    ), cache

  return Denoiser(init=init, apply=apply)

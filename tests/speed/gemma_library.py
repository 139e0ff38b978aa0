"""The library's sampler on a folder that `gemma_torch` wrote.

python tests/speed/gemma_library.py FOLDER
"""

import dataclasses
import sys

from decode_worker import serve
import jax
import jax.numpy as jnp
import numpy as np

from dllm_jax import load_pretrained
from dllm_jax.core.mask import Causal, Full
from dllm_jax.core.types import ModelInputs, Process
from dllm_jax.core.vocabulary import reduce
from dllm_jax.sampling.launch import Launcher
from dllm_jax.sampling.presets import SamplerConfig
from dllm_jax.sampling.requests import build

PROMPT, CANVASES, STEPS = 64, 2, 16  # as in `gemma_torch`


def main(folder: str) -> None:
  """Reads the folder, then serves."""
  model = load_pretrained(folder)
  objective = dataclasses.replace(model.objective, eos_id=None)
  vocab, width = objective.vocab_size, objective.canvas
  length = PROMPT + CANVASES * width
  sampler = SamplerConfig(preset="diffusion_gemma", steps=STEPS, rest=0.0)
  launcher = Launcher(sampler.build(objective, length=length), model.denoiser)
  logits = jax.jit(lambda *args: _logits(model.denoiser, *args))

  def generate(kind, rows):
    prompts = np.random.default_rng(0).integers(1, vocab, (rows, PROMPT))
    if kind == "logits":
      z = np.random.default_rng(1).integers(1, vocab, (rows, width))
      return np.asarray(logits(model.params, prompts, z))
    free = [None] * (CANVASES * width)
    requests = build(
      [row.tolist() + free for row in prompts],
      objective=objective,
      length=length,
    )
    key = jax.random.key(0)
    made = launcher(model.params, Process(), key, requests)
    return np.asarray(made.tokens)[:, PROMPT:]

  serve(generate)


def _logits(denoiser, params, prompts, z):
  """Returns the logits of canvases behind prompts."""

  def call(tokens, first, **fields):
    slots = jnp.arange(first, first + tokens.shape[1], dtype=jnp.int32)
    inputs = ModelInputs(
      latent=tokens,
      positions=jnp.broadcast_to(slots, tokens.shape),
      segment_ids=jnp.ones(tokens.shape, jnp.int32),
      **fields,
    )
    return denoiser.apply(params, inputs, None)[0]

  text = call(prompts, 0, mask=Causal())
  slot = jnp.full(z.shape[:1], PROMPT, jnp.int32)
  canvas = call(z, PROMPT, mask=Full(), past=text.past, slot=slot)
  return reduce(lambda logits: logits, canvas)


if __name__ == "__main__":
  main(sys.argv[1])

"""The library's train step, and the parameters and batch of the other two.

python tests/speed/library_step.py BATCH.npz MICROBATCHES
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import shape
from worker import serve

from dllm_jax.core.types import Batch
from dllm_jax.models.transformer import transformer, TransformerConfig
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.parallel.compilation import jit
from dllm_jax.training.optimizer import Optimizer
from dllm_jax.training.step import Trainer, Training


def main(path: str, microbatches: str) -> None:
  """Writes parameters and a batch to the file, then serves.

  Args:
    path: the file.
    microbatches: parts of a batch, whose activations take less memory.
  """
  config = TransformerConfig(
    vocab_size=shape.VOCAB,
    width=shape.WIDTH,
    layers=shape.LAYERS,
    heads=shape.HEADS,
    mlp_dim=shape.MLP,
    norm_eps=shape.EPS,
    rope_theta=shape.THETA,
    unroll=shape.LAYERS,
  )
  optimizer = Optimizer(
    learning_rate=shape.LEARNING_RATE,
    schedule="constant",
    warmup_steps=0,
    b1=shape.BETAS[0],
    b2=shape.BETAS[1],
    clip_norm=shape.CLIP,
  )
  trainer = Trainer(
    objective=MDLM(vocab_size=shape.VOCAB, mask_id=shape.MASK),
    denoiser=transformer(config),
    optimizer=optimizer.build(1000),
    training=Training(batch_size=shape.BATCH, microbatches=int(microbatches)),
  )
  rows = shape.BATCH, shape.LENGTH
  tokens = jax.random.randint(jax.random.key(0), rows, 0, shape.MASK)
  batch = Batch(
    tokens=tokens,
    loss_mask=jnp.ones(rows, bool),
    segment_ids=jnp.ones(rows, jnp.int32),
    positions=jnp.broadcast_to(jnp.arange(shape.LENGTH), rows),
  )
  state = jax.jit(trainer.init)(batch)
  process = trainer.init_process()
  objective = trainer.objective
  drawn = objective.draw(
    process, jax.random.key(1), batch, step=jnp.zeros((), jnp.int32)
  )
  weights = objective.weigh(process, tokens, drawn.z, drawn.t, batch)
  flat = jax.tree_util.tree_flatten_with_path(state.params["model"])[0]
  np.savez(
    path,
    tokens=tokens,
    z=drawn.z,
    weights=weights.loss,
    **{jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in flat},
  )

  @jax.jit
  def loss(params):
    denoise = lambda inputs: trainer.denoiser.apply(params, inputs, None)[0]
    found = objective.loss(
      process, denoise, drawn, batch, step=jnp.zeros((), jnp.int32)
    )
    return found.total / found.weight

  step = jit(trainer.step, donate_argnums=0)

  def steps(n):
    nonlocal state
    for _ in range(n):
      state, metrics = step(state, batch)
    jax.block_until_ready((state, metrics))

  serve(lambda: float(loss(state.params["model"])), steps)


if __name__ == "__main__":
  main(*sys.argv[1:])

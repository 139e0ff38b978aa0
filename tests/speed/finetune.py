"""A step of fine-tuning: adapters against all parameters, packed against alone.

    python -m tests.speed.finetune

Trains the network of `shape.py` (10.8 million parameters) on conversations of 20
to 100 tokens, of which the later half counts, in rows of 256: all parameters and
adapters of rank 8 with packed rows, and adapters with a conversation a row. The
three programs step in turns, fifteen rounds, each first in its turn. Prints JSON:
seconds of a step, medians, and the medians of the rounds' ratios.
"""

import json
import statistics
import time

import jax
import numpy as np

from dllm_jax import data
from dllm_jax.data.conversations.examples import Example
from dllm_jax.data.conversations.rows import ConversationRows
from dllm_jax.data.corpus import Corpus
from dllm_jax.data.tokenizer import make_tokenizer
from dllm_jax.models import LoRA, transformer, TransformerConfig
from dllm_jax.objectives.llada import LLaDA
from dllm_jax.objectives.texts import Fill
from dllm_jax.parallel import compilation, make_mesh
from dllm_jax.training.optimizer import Optimizer
from dllm_jax.training.step import Trainer, Training
from tests.speed import shape

ROUNDS = 15
RANK = 8


def _batch(packed: bool):
  """Returns a batch of conversations, and how many of its tokens count."""
  rng = np.random.default_rng(0)
  examples = []
  for length in rng.integers(20, 101, 400):
    tokens = rng.integers(0, shape.MASK, length).astype(np.int32)
    examples.append(Example(tokens, np.arange(length) >= length // 2))
  rows = ConversationRows(
    examples,
    length=shape.LENGTH,
    packed=packed,
    fill=Fill(),
    fill_id=None,
  )
  corpus = Corpus(
    tokenizer=make_tokenizer(f"numbers:{shape.VOCAB}", []),
    length=shape.LENGTH,
    train=rows,
    held_out=None,
    held_out_text=None,
    texts_apart=packed,
  )
  batches = data.train_iterator(corpus, batch_size=shape.BATCH, seed=0)
  batch = jax.device_put(next(batches))
  batches.close()
  return batch, int(batch.loss_mask.sum())


def _program(adapter: LoRA, batch, mesh):
  """Returns a compiled step and its first state."""
  network = TransformerConfig(
    vocab_size=shape.VOCAB,
    width=shape.WIDTH,
    layers=shape.LAYERS,
    heads=shape.HEADS,
    mlp_dim=shape.MLP,
    norm_eps=shape.EPS,
    rope_theta=shape.THETA,
    unroll=shape.LAYERS,
    adapter=adapter,
  )
  only = r".*/lora_[a-z]+" if adapter.rank else ""
  optimizer = Optimizer(learning_rate=1e-4, warmup_steps=0, train_only=only)
  trainer = Trainer(
    objective=LLaDA(
      vocab_size=shape.VOCAB, mask_id=shape.MASK, random_length=0.0
    ),
    denoiser=transformer(network),
    optimizer=optimizer.build(1000),
    training=Training(batch_size=shape.BATCH, microbatches=4),
    trains=optimizer.trains if only else None,
  )
  step = compilation.jit(
    trainer.step,
    mesh=mesh,
    options=compilation.step_options(mesh),
    donate_argnums=0,
  )
  return step, jax.jit(trainer.init)(batch)


def main() -> None:
  """Measures and prints."""
  mesh = make_mesh({"data": 1}, jax.devices()[:1])
  packed, alone = _batch(True), _batch(False)
  names = ("full", "adapters", "adapters, a row each")
  seconds = [], [], []
  with jax.set_mesh(mesh):
    ways = [
      (*_program(LoRA(), packed[0], mesh), packed[0]),
      (*_program(LoRA(rank=RANK), packed[0], mesh), packed[0]),
      (*_program(LoRA(rank=RANK), alone[0], mesh), alone[0]),
    ]
    for round_ in range(ROUNDS + 1):  # The first one compiles.
      # Each begins as often: what comes after a larger program pays for it.
      for turn in range(len(ways)):
        at = (round_ + turn) % len(ways)
        step, state, batch = ways[at]
        start = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, batch))
        if round_:
          seconds[at].append(time.perf_counter() - start)
        ways[at] = step, state, batch
  full, adapters, each = seconds
  ratio = lambda a, b: statistics.median(
    x / y for x, y in zip(a, b, strict=True)
  )
  found = {
    "seconds": {k: statistics.median(v) for k, v in zip(names, seconds)},
    "adapters_to_full": ratio(adapters, full),
    "supervised_tokens": {"packed": packed[1], "a row each": alone[1]},
    "packed_to_alone": ratio(each, adapters) * packed[1] / alone[1],
  }
  print(json.dumps(found))


if __name__ == "__main__":
  main()

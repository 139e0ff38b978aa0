"""Neighbours and padding are not seen: rows of other lengths, rows cut short."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_allclose
import pytest

import dllm_jax
from dllm_jax.core.types import Batch
from dllm_jax.run import exchange
from dllm_jax.run.run import Run
from dllm_jax.sampling.presets import SamplerConfig
from tests.pretrained.golden import publish
from tests.quick import long

PROMPTS = ["10", "20 21 22 23 24 25 26"]


# NVIDIA-NeMo/Megatron-Bridge pull request 4760, ML-GSAI/LLaDA issue 90 and
# huggingface/diffusers issue 13598: a short prompt's answer depended on its
# longer neighbour.
@pytest.mark.parametrize(
  ("name", "fields"),
  [
    long("llada_logits", {"block_length": 8, "cache": "dual"}),
    long("llada_logits", {}),
    long("llada_logits", {"block_length": 8, "cache": "prefix"}),
    long("sdar", {"temperature": 0.0}),
    long("llada2_moe", {"temperature": 0.0}),
  ],
  ids=str,
)
def test_a_short_prompt_knows_nothing_of_its_neighbour(name, fields, tmp_path):
  exchange.import_folder(publish(name, tmp_path / "in"), tmp_path / "run")
  run = Run.open(tmp_path / "run", devices=jax.devices()[:1])
  sampler = SamplerConfig(**{"preset": run.config.sampler.preset, **fields})
  answers = lambda prompts: (
    run.sample(prompts, new_tokens=8, sampler=sampler, seed=0).texts
  )
  together = answers(PROMPTS)
  assert together == [answers([prompt])[0] for prompt in PROMPTS]
  assert together[0] != together[1]


def rows(model, length):
  """Returns a row of tokens with padding after them, as a batch."""
  ids = np.random.default_rng(0).choice(model.ids.mask, 20)
  tokens = np.zeros((1, length), np.int32)
  tokens[0, :20] = ids
  real = np.arange(length)[None] < 20
  return Batch(
    tokens=jnp.asarray(tokens),
    loss_mask=jnp.asarray(real),
    segment_ids=jnp.asarray(real, jnp.int32),
    positions=jnp.arange(length)[None],
  )


# axolotl-ai-cloud/axolotl pull request 3735 and ZHZisZZ/dllm issue 15: tokens
# attended to padding where rows were not packed.
@pytest.mark.parametrize(
  "name", ["dream_logits", pytest.param("llada_logits", marks=pytest.mark.all)]
)
def test_padding_is_not_attended_to(name, tmp_path):
  model = dllm_jax.load_pretrained(publish(name, tmp_path / "in"))
  short, padded = rows(model, 20), rows(model, 32)
  alone = np.asarray(model.logits(short.tokens))
  real = np.asarray(padded.segment_ids) > 0
  scale = np.abs(alone).max()
  for mask in (real, real[:, None, :] & real[:, :, None]):
    beside = np.asarray(model.logits(padded.tokens, attention_mask=mask))
    assert_allclose(beside[:, :20], alone, atol=1e-5 * scale)
  seen = np.asarray(model.logits(padded.tokens))[:, :20]
  assert np.abs(seen - alone).max() > 0.1  # What the mask is there for.


@pytest.mark.all
@pytest.mark.parametrize("name", ["llada_logits", "dream_logits"])
def test_a_loss_does_not_know_its_padding(name, tmp_path):
  model = dllm_jax.load_pretrained(publish(name, tmp_path / "in"))
  objective = model.objective
  process = objective.unbiased(objective.init(jax.random.key(0)))
  step = jnp.zeros((), jnp.int32)

  def padded_like(shape):
    """Pads what was drawn for the short row to the long one's length."""

    def pad(x, like):
      widths = [(0, b - a) for a, b in zip(x.shape, like.shape, strict=True)]
      return jnp.pad(x, widths)

    return lambda drawn: jax.tree.map(pad, drawn, shape)

  def loss(batch, drawn):
    denoise = lambda inputs: model.denoiser.apply(model.params, inputs, None)[0]
    return objective.loss(process, denoise, drawn, batch, step=step)

  short, padded = rows(model, 20), rows(model, 32)
  draw = lambda batch: objective.draw(
    process, jax.random.key(1), batch, step=step
  )
  drawn = draw(short)
  first = loss(short, drawn)
  second = loss(padded, padded_like(jax.eval_shape(draw, padded))(drawn))
  assert_allclose(second.total, first.total, rtol=1e-5)
  assert_allclose(second.weight, first.weight, rtol=1e-6)
  assert first.weight > 0
  assert not np.any(np.asarray(second.bound)[:, 20:])

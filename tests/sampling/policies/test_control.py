"""Control by gradients: a classifier makes the class that it is asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.noise import Keyed
from dllm_jax.core.types import Batch, ModelOutputs
from dllm_jax.models import transformer, TransformerConfig
from dllm_jax.objectives.diffusion_lm import DiffusionLM
from dllm_jax.objectives.mdlm import MDLM
from dllm_jax.sampling.launch import Launcher
from dllm_jax.sampling.policies.ancestral import Ancestral
from dllm_jax.sampling.policies.control import (
  Controlled,
  LatentClassifier,
  steered,
)
from dllm_jax.sampling.program import Sampler
from dllm_jax.sampling.requests import build
from dllm_jax.training.optimizer import Optimizer
from dllm_jax.training.step import Trainer, Training

VOCAB, LENGTH, ROWS, STEPS = 6, 8, 64, 40
DIFFUSION = DiffusionLM(vocab_size=VOCAB, features=4, steps=100)


def text(key) -> Batch:
  """Returns rows of one half of the vocabulary or the other: their class."""
  key_label, key_token = jax.random.split(key)
  label = jax.random.bernoulli(key_label, 0.5, (ROWS,)).astype(jnp.int32)
  half = jax.random.randint(key_token, (ROWS, LENGTH), 0, VOCAB // 2)
  ones = jnp.ones((ROWS, LENGTH), jnp.int32)
  return Batch(
    tokens=half + label[:, None] * (VOCAB // 2),
    loss_mask=ones.astype(bool),
    segment_ids=ones,
    positions=jnp.broadcast_to(jnp.arange(LENGTH), ones.shape),
    cond=label,
  )


def network(objective):
  return transformer(
    TransformerConfig(
      vocab_size=VOCAB,
      width=32,
      layers=1,
      heads=2,
      **objective.network_fields(),
    )
  )


def trained(objective, steps, process=None):
  """Returns (network, parameters, last metrics) after our own train step."""
  training = Training(steps=steps, batch_size=ROWS)
  optimizer = Optimizer(learning_rate=5e-3, warmup_steps=10)
  trainer = Trainer(
    objective=objective,
    denoiser=network(objective),
    optimizer=optimizer.build(steps),
    training=training,
  )
  state = jax.jit(lambda: trainer.init(text(jax.random.key(0))))()
  if process is not None:
    held = state.process.replace(constants={"diffusion": process})
    state = state.replace(process=held)

  @jax.jit
  def run(state):
    keys = jax.random.split(jax.random.key(1), steps)
    return jax.lax.scan(lambda s, k: trainer.step(s, text(k)), state, keys)

  state, metrics = run(state)
  return trainer.denoiser, state, jax.tree.map(lambda x: x[-20:], metrics)


@pytest.fixture(scope="module")
def diffusion():
  denoiser, state, _ = trained(DIFFUSION, 400)
  process = state.process.replace(params=state.params["process"])
  return denoiser, state.params["model"], process


@pytest.fixture(scope="module")
def classifier(diffusion):
  objective = LatentClassifier(diffusion=DIFFUSION, classes=2)
  denoiser, state, metrics = trained(objective, 150, diffusion[2])
  assert float(jnp.mean(metrics["accuracy"])) > 0.8  # over all noise levels
  return denoiser, state.params["model"]


def share(tokens, labels) -> float:
  """Returns how many rows are mostly of the half that their label names."""
  upper = np.mean(np.asarray(tokens) >= VOCAB // 2, axis=1) > 0.5
  return float(np.mean(upper == np.asarray(labels)))


@pytest.mark.all  # trains a network and a classifier
def test_control_raises_the_success_rate(diffusion, classifier):
  denoiser, params, process = diffusion
  classify, control = classifier[0].apply, classifier[1]
  labels = np.arange(ROWS) % 2
  requests = build([[None] * LENGTH] * ROWS, objective=DIFFUSION, length=LENGTH)
  wanted = {}
  for name, policy in (
    ("free", Ancestral(objective=DIFFUSION, steps=STEPS)),
    (
      "controlled",
      Controlled(objective=DIFFUSION, steps=STEPS, classify=classify),
    ),
  ):
    launcher = Launcher(Sampler(policy=policy, length=LENGTH), denoiser)
    for sign in (0, 1):  # either label: one program
      want = labels ^ sign
      tokens = launcher(
        params, steered(process, control, want), jax.random.key(2), requests
      ).tokens
      wanted[name, sign] = share(tokens, want)
    assert launcher.programs() == 1
  # 64 rows: two standard errors of a fair coin are 0.125.
  assert max(wanted["free", 0], wanted["free", 1]) < 0.7
  assert min(wanted["controlled", 0], wanted["controlled", 1]) > 0.85


@pytest.mark.all
def test_samples_look_like_the_text(diffusion):
  """Rows of one half of the vocabulary only, as all of the text is."""
  denoiser, params, process = diffusion
  policy = Ancestral(objective=DIFFUSION, steps=STEPS)
  requests = build([[None] * LENGTH] * ROWS, objective=DIFFUSION, length=LENGTH)
  launcher = Launcher(Sampler(policy=policy, length=LENGTH), denoiser)
  tokens = launcher(params, process, jax.random.key(2), requests).tokens
  upper = np.mean(np.asarray(tokens) >= VOCAB // 2, axis=1)
  pure = np.mean((upper == 0) | (upper == 1))
  assert pure > 0.7  # tokens at random would give 2 / 2^8


def test_a_step_moves_latents_towards_their_label():
  """Of a classifier that reads the sign of the first feature only."""

  def classify(params, inputs, cache):
    first = params * inputs.latent[..., :1]
    return ModelOutputs(hidden=jnp.concatenate([first, -first], -1)), cache

  policy = Controlled(objective=DIFFUSION, steps=STEPS, classify=classify)

  @jax.jit
  def run(labels):
    process = DIFFUSION.init(jax.random.key(0))
    process = steered(process, jnp.float32(1.0), labels)
    z, active = jnp.zeros((2, LENGTH, 4)), jnp.ones((2, LENGTH), bool)
    noise = Keyed.at(
      jax.random.key(1),
      request=jnp.zeros(2, jnp.int32),  # both rows get the same noise
      step=jnp.zeros(2, jnp.int32),
      position=jnp.tile(jnp.arange(LENGTH), (2, 1)),
    )
    out, state = ModelOutputs(hidden=z), policy.init(process, z, active)
    return policy.step(process, noise, out, z, state, active)[0]

  first, second = np.asarray(run(np.array([0, 1])))
  assert (first[:, 0] > second[:, 0]).all()
  np.testing.assert_array_equal(first[:, 1:], second[:, 1:])
  same = np.asarray(run(np.array([1, 1])))
  np.testing.assert_array_equal(same[0], same[1])


def test_refusals():
  with pytest.raises(ValueError, match="Gaussian"):
    LatentClassifier(diffusion=MDLM(vocab_size=4, mask_id=3), classes=2)
  with pytest.raises(ValueError, match="classes"):
    LatentClassifier(diffusion=DIFFUSION, classes=1)
  policy = Controlled(objective=DIFFUSION, steps=2, classify=print)
  with pytest.raises(ValueError, match="rate"):
    dataclasses.replace(policy, rate=0.0)

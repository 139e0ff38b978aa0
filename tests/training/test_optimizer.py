"""Learning rates by their closed form; what decays and what is clipped."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dllm_jax.training.optimizer import Optimizer


def _rates(steps, **fields):
  rate = Optimizer(learning_rate=1.0, **fields).learning_rates(steps)
  return np.array([float(rate(k)) for k in range(steps)])


def test_warmup_moves_at_the_first_step():
  rates = _rates(8, warmup_steps=4, schedule="constant")
  np.testing.assert_allclose(rates, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1])


def test_cosine_ends_at_the_final_fraction():
  rates = _rates(101, warmup_steps=0, schedule="cosine", final_fraction=0.1)
  assert rates[0] == 1.0
  # Step k of n: f + (1 - f) (1 + cos(pi k / n)) / 2.
  k = np.arange(101)
  expected = 0.1 + 0.9 * (1 + np.cos(np.pi * k / 101)) / 2
  np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_wsd_is_flat_then_linear():
  rates = _rates(
    10, warmup_steps=2, schedule="wsd", decay_steps=4, final_fraction=0.0
  )
  np.testing.assert_allclose(
    rates, [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25], atol=1e-6
  )


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_decay_spares_norms_biases_and_the_process(name):
  params = {
    "model": {
      "q": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones((4,))},
      "norm": {"scale": jnp.ones((4,))},
    },
    "process": {"embedding": jnp.ones((4, 4))},
  }
  rule = Optimizer(
    name=name,
    learning_rate=0.5,
    weight_decay=0.5,
    warmup_steps=0,
    schedule="constant",
  ).build(10)
  zeros = {
    "model": {
      "q": {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros((4,))},
      "norm": {"scale": jnp.zeros((4,))},
    },
    "process": {"embedding": jnp.zeros((4, 4))},
  }
  updates, _ = rule.update(zeros, rule.init(params), params)
  after = optax.apply_updates(params, updates)
  assert float(after["model"]["q"]["kernel"][0, 0]) < 1.0
  assert float(after["model"]["q"]["bias"][0]) == 1.0
  assert float(after["model"]["norm"]["scale"][0]) == 1.0
  assert float(after["process"]["embedding"][0, 0]) == 1.0


@pytest.mark.parametrize(
  "fields, words",
  [
    ({"name": "sgd"}, "adamw, lion"),
    ({"schedule": "square"}, "constant, cosine, wsd"),
    ({"learning_rate": 0.0}, "above 0"),
  ],
)
def test_bad_fields_say_what_is_legal(fields, words):
  with pytest.raises(ValueError, match=words):
    Optimizer(**fields)

"""SEDD against its original: scores, losses and reverse steps, both graphs.

Log-scores to 2e-4, probabilities and losses to 2e-4 relative, as the golden sets
state; noise schedules to 1e-5 relative.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dllm_jax.core.noise import Recorded, Tag
from dllm_jax.core.schedule import Geometric, LogLinear
from dllm_jax.core.types import ModelOutputs
from dllm_jax.objectives.mixture import likelihood, Parts
from dllm_jax.objectives.sedd import SEDD
from tests import golden_cases

_CASES = ("sedd_absorb", "sedd_uniform")
_GUMBEL = 1e-10  # of the originals' rule p / (1e-10 - log(u + 1e-10))


def _schedule(noise):
  if noise["type"] == "loglinear":
    return LogLinear()
  return Geometric(
      sigma_min=noise["sigma_min"], sigma_max=noise["sigma_max"]
  )


@pytest.fixture(scope="module", params=_CASES)
def case(request):
  found = golden_cases.load(request.param)
  config = found.config["config"]
  absorbing = config["graph"]["type"] == "absorb"
  objective = SEDD(
      vocab_size=found.config["dim"],
      mask_id=found.config["dim"] - 1 if absorbing else None,
      graph="absorbing" if absorbing else "uniform",
      schedule=_schedule(config["noise"]),
      scale_by_sigma=config["model"]["scale_by_sigma"],
  )
  return objective, found.arrays


def _raw(objective, log_score, t):
  """Returns network outputs that the objective turns into the log-scores."""
  if not objective.scale_by_sigma:
    return jnp.asarray(log_score)
  sigma = objective.schedule.sigma(jnp.asarray(t))
  scale = jnp.log(jnp.expm1(sigma)) + np.log(objective.vocab_size - 1)
  return jnp.asarray(log_score) + scale[..., None]


def _close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-7)


def test_noise_schedules(case):
  _, g = case
  t = jnp.asarray(g["grid_t"])
  for name, schedule in (
      ("geometric", Geometric(sigma_min=1e-4, sigma_max=20.0)),
      ("loglinear", LogLinear()),
  ):
    # sigma = -log1p(-x) near x = 1 - 1e-3 loses 1e-4 relative in float32.
    np.testing.assert_allclose(
        schedule.sigma(t), g[f"noise_{name}_total"], rtol=1e-4, atol=1e-7
    )
    np.testing.assert_allclose(
        schedule.dsigma(t), g[f"noise_{name}_rate"], rtol=2e-4
    )


def test_score_and_loss(case):
  objective, g = case
  t = jnp.asarray(g["t"])[:, None]
  logits, z = _raw(objective, g["log_score"], t), jnp.asarray(g["x"])
  log_score = objective.log_score(logits, z, t)
  np.testing.assert_allclose(log_score, g["log_score"], atol=2e-4)
  np.testing.assert_allclose(jnp.exp(log_score), g["score"], rtol=2e-4)
  np.testing.assert_allclose(
      objective.schedule.sigma(t)[:, 0], g["sigma"], rtol=1e-4
  )
  np.testing.assert_allclose(
      objective.schedule.dsigma(t)[:, 0], g["dsigma"], rtol=1e-4
  )
  entropy = objective.score_entropy(log_score, g["x0"], z, t)
  np.testing.assert_allclose(
      entropy, g["score_entropy"], rtol=2e-4, atol=2e-5
  )
  loss = objective.token_loss(None, logits, jnp.asarray(g["x0"]), z, t)
  np.testing.assert_allclose(np.sum(loss, axis=1), g["loss"], rtol=2e-4)


def test_transitions(case):
  objective, g = case
  lost = -jnp.expm1(-jnp.asarray(g["graph_sigma"]))
  none = jnp.zeros_like(lost)
  noise = (none, lost) if objective.absorbing else (lost, none)
  states = jnp.arange(objective.vocab_size)[None]
  found = likelihood(
      Parts(1.0 - lost, *noise),
      jnp.tile(states, (len(lost), 1)),
      objective.vocab_size,
      objective.mask_id,
      absorbing=objective.absorbing,
  )
  np.testing.assert_allclose(
      found, g["transp_transition_rows"], rtol=1e-5, atol=1e-7
  )


def _posterior(objective, g, t, s):
  logits = _raw(objective, g["log_score"], g["t"][:, None])
  # The recorded step reads the network at its own time.
  logits = _raw(objective, g["log_score"], t) if logits is not None else None
  return logits, objective.posterior(
      None, logits, jnp.asarray(g["x"]), jnp.asarray(t), jnp.asarray(s)
  )
